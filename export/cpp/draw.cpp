// draw MODEL.pt2 SEED LABEL OUT.pgm: one image of a package that `fastcm export MODEL --aot MODEL.pt2 --seeded --uint8` wrote, and how long
// such an image takes.

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <iostream>
#include <vector>

#include "fastcm.hpp"

int main(int argc, char** argv) {
  if (argc != 5) {
    std::cerr << "usage: draw MODEL.pt2 SEED LABEL OUT.pgm\n";
    return 2;
  }
  try {
    fastcm::Generator generator(argv[1]);
    std::vector<at::Tensor> inputs;
    for (const auto& value : generator.inputs()) {
      const char* text = argv[value.name == "labels" ? 3 : 2];
      inputs.push_back(torch::full({1}, static_cast<std::int64_t>(std::strtoll(text, nullptr, 10)), torch::kLong));
    }
    const at::Tensor image = generator(inputs)[0];  // height, width, channels

    std::vector<double> times;
    for (int i = 0; i < 100; ++i) {
      const auto start = std::chrono::steady_clock::now();
      generator(inputs);
      times.push_back(std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count());
    }
    std::sort(times.begin(), times.end());
    std::printf("seed to image: p50 %.3f ms, p99 %.3f ms\n", times[50], times[99]);

    std::ofstream out(argv[4], std::ios::binary);
    out << (image.size(2) == 1 ? "P5\n" : "P6\n") << image.size(1) << ' ' << image.size(0) << "\n255\n";
    out.write(reinterpret_cast<const char*>(image.contiguous().data_ptr<std::uint8_t>()), image.numel());
    return out ? 0 : 1;
  } catch (const std::exception& error) {
    std::cerr << "draw: " << error.what() << '\n';
    return 1;
  }
}
