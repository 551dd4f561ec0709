// Two CUDA devices that lie in the CPU's memory, for a torch without CUDA: its own dispatch key, autograd, torch.library and FakeTensor
// take them for real ones. An operation without a kernel here goes to `fallback`, which runs the CPU's on the same memory. pretended.py
// loads this library and patches torch.cuda by its operations, torch.ops.pretended.*.

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/TensorFactories.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <unordered_map>
#include <unordered_set>

extern "C" {
int PyGILState_Check();
void* PyEval_SaveThread();
void PyEval_RestoreThread(void*);
}

namespace {

using at::Tensor;
using c10::Device;
using c10::IValue;
using c10::StorageImpl;
using Stack = torch::jit::Stack;

constexpr auto CUDA = c10::DeviceType::CUDA;
constexpr int DEVICES = 2;
constexpr int POISON = 0xFF;  // NaN in every float, -1 in every integer: what nobody has written, or everybody has freed

bool lies_here(const Tensor& t) { return t.defined() && t.device().type() == CUDA; }

// One lock for all that follows: what is pretended is small, and who holds it may call back into it.
std::recursive_mutex everything;

// Who holds it may ask for Python's lock, which counts tensors: who has that one (as when it takes a slice) lets go of it while it waits.
struct Held {
  Held() {
    if (everything.try_lock()) return;
    void* python = PyGILState_Check() ? PyEval_SaveThread() : nullptr;
    everything.lock();
    if (python) PyEval_RestoreThread(python);
  }
  Held(const Held&) = delete;
  ~Held() { everything.unlock(); }
};

// ---------------------------------------------------------------- memory

int64_t allocated_bytes = 0, peak_bytes = 0, limit_bytes = INT64_MAX;
thread_local int current_device = 0;

struct Block {
  void* data;
  int64_t bytes;
};

void free_block(void* context) {
  std::unique_ptr<Block> block(static_cast<Block*>(context));
  std::memset(block->data, POISON, block->bytes);
  std::free(block->data);
  Held held;
  allocated_bytes -= block->bytes;
}

c10::DataPtr allocate_on(int device, size_t size) {
  if (size == 0) return {nullptr, Device(CUDA, device)};
  const auto bytes = static_cast<int64_t>(size);
  Held held;
  TORCH_CHECK_WITH(
      OutOfMemoryError, allocated_bytes + bytes <= limit_bytes, "CUDA out of memory. Tried to allocate ", bytes, " bytes of ", limit_bytes,
      ", of which ", allocated_bytes, " are allocated.");
  allocated_bytes += bytes;
  peak_bytes = std::max(peak_bytes, allocated_bytes);
  void* data = std::aligned_alloc(512, (size + 511) / 512 * 512);
  std::memset(data, POISON, size);
  return {data, new Block{data, bytes}, &free_block, Device(CUDA, device)};
}

struct DeviceAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override { return allocate_on(current_device, bytes); }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
} device_allocator;

std::map<uintptr_t, size_t> pinned;
void page_locking();

struct PinnedAllocator final : c10::Allocator {
  static void free_pinned(void* data) {
    Held held;
    pinned.erase(reinterpret_cast<uintptr_t>(data));
    std::free(data);
  }
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) return {nullptr, Device(c10::kCPU)};
    Held held;
    page_locking();
    void* data = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
    std::memset(data, POISON, bytes);
    pinned[reinterpret_cast<uintptr_t>(data)] = bytes;
    return {data, data, &free_pinned, Device(c10::kCPU)};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
} pinned_allocator;

bool is_pinned(const void* data) {
  Held held;
  const auto place = reinterpret_cast<uintptr_t>(data);
  auto after = pinned.upper_bound(place);
  return after != pinned.begin() && place < std::prev(after)->first + std::prev(after)->second;
}

// ---------------------------------------------------------------- streams, graphs, waits

thread_local int64_t current_streams[DEVICES] = {0, 0};
int64_t last_stream = 0, last_graph = 0, last_pool = 0;
std::atomic<int64_t> waits{0};  // of the host for a device
bool waits_forbidden = false;   // those that the program does not ask for

// Work of a graph. outside: memory that the graph reads or writes and that is not its pool's.
struct Node {
  std::string name;
  std::function<void()> run;
  std::vector<std::pair<c10::weak_intrusive_ptr<StorageImpl>, const void*>> outside;
};

struct Graph {
  int64_t pool = 0, order = 0, stream = 0;
  bool ready = false, broken = false;
  std::thread::id thread;
  std::vector<Node> nodes;
  std::vector<c10::Storage> memory;  // of its pool, allocated during the capture
  std::unordered_set<StorageImpl*> own;
  std::unordered_map<StorageImpl*, std::pair<c10::Storage, std::vector<char>>> before;  // what the capture must leave as it was

  void poison() {
    for (auto& storage : memory) std::memset(storage.mutable_data(), POISON, storage.nbytes());
  }
};

std::map<int64_t, std::unique_ptr<Graph>> graphs;
std::unordered_map<int64_t, Graph*> captures;  // by stream

Graph* capturing(int device) {
  auto found = captures.find(current_streams[device]);
  return found == captures.end() ? nullptr : found->second;
}

[[noreturn]] void not_permitted(Graph* graph, const std::string& what) {
  graph->broken = true;
  TORCH_CHECK(false, "CUDA error: operation not permitted when stream is capturing (", what, ")");
}

void page_locking() {
  for (auto& [stream, graph] : captures)
    if (graph->thread == std::this_thread::get_id()) not_permitted(graph, "page-locked memory");
}

// Copies that the host does not wait for. Into pinned memory the values come at the next wait; from it they are read at once, and the wait
// looks whether the host has left them alone.
struct Pending {
  c10::weak_intrusive_ptr<StorageImpl> host;
  Tensor place, values;
  bool to_host;
};
std::vector<Pending> pending;

void wait(bool asked) {
  Held held;
  ++waits;
  TORCH_CHECK(asked || !waits_forbidden, "called a synchronizing CUDA operation");
  auto due = std::move(pending);
  pending.clear();
  at::AutoDispatchBelowADInplaceOrView below;
  for (auto& copy : due) {
    if (!copy.host.lock()) continue;
    if (copy.to_host) {
      copy.place.copy_(copy.values);
    } else {
      TORCH_CHECK(
          at::equal(copy.place.view(at::kByte), copy.values.view(at::kByte)), "pretended: pinned memory was changed before a copy from it was waited for.");
    }
  }
}

void wait_for_stream(int64_t stream) {
  Held held;
  auto found = captures.find(stream);
  if (found != captures.end()) not_permitted(found->second, "synchronize");
  wait(true);
}

void wait_for_device() {
  Held held;
  if (!captures.empty()) not_permitted(captures.begin()->second, "synchronize");
  wait(true);
}

Graph& graph_of(int64_t id) {
  auto found = graphs.find(id);
  TORCH_CHECK(found != graphs.end(), "pretended: no such graph");
  return *found->second;
}

void begin_capture(int64_t id, int64_t pool, int64_t stream) {
  Held held;
  Graph& graph = graph_of(id);
  TORCH_CHECK(stream != 0, "CUDA graphs must be captured on a non-default stream.");
  TORCH_CHECK(captures.empty(), "CUDA error: operation not permitted when stream is capturing (a second capture)");
  TORCH_CHECK(!graph.ready, "This CUDAGraph instance already owns a captured graph.");
  graph.pool = pool, graph.stream = stream, graph.order = ++last_graph, graph.thread = std::this_thread::get_id();
  captures[stream] = &graph;
}

void end_capture(int64_t id) {
  Held held;
  Graph& graph = graph_of(id);
  TORCH_CHECK(captures.erase(graph.stream), "CUDA error: no capture to end");
  // A capture does nothing: memory is as it was before, and what was allocated holds nothing yet.
  for (auto& [impl, kept] : graph.before) std::memcpy(kept.first.mutable_data(), kept.second.data(), kept.second.size());
  graph.before.clear();
  graph.poison();
  TORCH_CHECK(!graph.broken, "CUDA error: operation failed due to a previous error during capture");
  graph.ready = true;
}

void replay(int64_t id) {
  Held held;
  Graph& graph = graph_of(id);
  TORCH_CHECK(graph.ready, "Called CUDAGraph::replay without a preceding successful capture.");
  for (auto& [other_id, other] : graphs)  // what this graph freed, those captured after it in one pool may have got
    if (other->pool == graph.pool && other->order > graph.order && other->ready) other->poison();
  at::AutoDispatchBelowADInplaceOrView below;
  for (auto& node : graph.nodes) {
    for (auto& [weak, data] : node.outside) {
      auto alive = weak.lock();
      TORCH_CHECK(alive && alive->data() == data, "pretended: a graph works on memory that was freed after its capture (", node.name, ").");
    }
    node.run();
  }
}

// ---------------------------------------------------------------- the same memory as the CPU's

struct Aliases {
  std::unordered_map<StorageImpl*, c10::Storage> host, here;  // the other side's storage
  std::vector<std::pair<Tensor, Tensor>> pairs;               // a tensor of a device, the CPU's of the same memory

  Tensor of(const Tensor& t) {
    for (auto& [original, alias] : pairs)
      if (original.is_same(t)) return alias;
    auto* impl = t.storage().unsafeGetStorageImpl();
    if (!host.count(impl)) {
      c10::DataPtr data(const_cast<void*>(t.storage().data()), Device(c10::kCPU));
      c10::Storage storage(c10::Storage::use_byte_size_t(), t.storage().nbytes(), std::move(data), c10::GetCPUAllocator(), true);
      here.emplace(storage.unsafeGetStorageImpl(), t.storage());
      host.emplace(impl, std::move(storage));
    }
    auto alias = at::detail::make_tensor<c10::TensorImpl>(
        c10::Storage(host.at(impl)), c10::DispatchKeySet(c10::DispatchKey::CPU), t.dtype());
    alias.unsafeGetTensorImpl()->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
    if (t.unsafeGetTensorImpl()->is_wrapped_number()) alias.unsafeGetTensorImpl()->set_wrapped_number(true);
    pairs.emplace_back(t, alias);
    return alias;
  }

  IValue of(const IValue& value) {
    if (value.isTensor()) return lies_here(value.toTensor()) ? IValue(of(value.toTensor())) : value;
    if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& t : value.toTensorVector()) list.push_back(lies_here(t) ? of(t) : t);
      return list;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> list;
      for (const auto& t : value.toOptionalTensorVector()) list.push_back(t && lies_here(*t) ? std::optional<Tensor>(of(*t)) : t);
      return list;
    }
    if (value.isDevice() && value.toDevice().type() == CUDA) return Device(c10::kCPU);
    return value;
  }
};

template <typename F>
void each_tensor(const IValue& value, F&& f) {
  if (value.isTensor()) {
    f(value.toTensor());
  } else if (value.isTensorList()) {
    for (const Tensor& t : value.toTensorVector()) f(t);
  } else if (value.isOptionalTensorList()) {
    for (const auto& t : value.toOptionalTensorVector())
      if (t) f(*t);
  }
}

// A tensor of a device with the shape of `like`; a view of `parent` where there is one.
Tensor tensor_in(c10::Storage storage, const Tensor& like, const Tensor& parent = {}) {
  auto t = parent.defined()
      ? at::detail::make_tensor<c10::TensorImpl>(c10::TensorImpl::VIEW, std::move(storage), parent.key_set(), like.dtype())
      : at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(c10::DispatchKey::CUDA), like.dtype());
  t.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  if (like.unsafeGetTensorImpl()->is_wrapped_number()) t.unsafeGetTensorImpl()->set_wrapped_number(true);
  return t;
}

void belongs_to_capture(int device, const c10::Storage& storage) {
  Held held;
  if (auto* graph = capturing(device)) {
    graph->memory.push_back(storage);
    graph->own.insert(storage.unsafeGetStorageImpl());
  }
}

void keep(Graph* graph, const Tensor& t) {
  auto* impl = t.storage().unsafeGetStorageImpl();
  auto* data = static_cast<const char*>(t.storage().data());
  if (data && !graph->own.count(impl) && !graph->before.count(impl))
    graph->before.emplace(impl, std::make_pair(t.storage(), std::vector<char>(data, data + t.storage().nbytes())));
}

void refer(Graph* graph, Node& node, const Tensor& t) {
  auto* impl = lies_here(t) && t.storage().nbytes() ? t.storage().unsafeGetStorageImpl() : nullptr;
  if (impl && !graph->own.count(impl)) node.outside.emplace_back(t.storage().getWeakStorageImpl(), t.storage().data());
}

// ---------------------------------------------------------------- operations

// Those on a TensorIterator that takes a CPU tensor without dimensions beside a device's.
const std::unordered_set<std::string> TAKE_HOST_SCALARS = {
    "add", "sub", "rsub", "mul", "multiply", "div", "divide", "true_divide", "floor_divide", "remainder", "fmod", "pow", "atan2", "maximum",
    "minimum", "fmax", "fmin", "eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or", "logical_xor", "bitwise_and", "bitwise_or",
    "bitwise_xor", "bitwise_left_shift", "bitwise_right_shift", "__and__", "__or__", "__xor__", "__lshift__", "__rshift__", "where", "fill",
    "masked_fill", "index_fill", "index_put", "_index_put_impl", "addcmul", "addcdiv", "ldexp", "xlogy", "hypot"};
const std::unordered_set<std::string> INDEXING = {"index", "_unsafe_index", "index_put", "_unsafe_index_put", "_index_put_impl"};
// The host reads their result, or its shape.
const std::unordered_set<std::string> WAITING = {
    "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal", "bincount", "is_nonzero", "repeat_interleave"};
const std::unordered_set<std::string> OF_SHAPES = {"resize_", "as_strided_", "set_", "squeeze_", "unsqueeze_", "t_", "transpose_"};

// The one device of an operation's tensors; an error where CPU tensors are among them or two devices meet.
int device_of(const std::string& name, const std::string& plain, const std::vector<IValue>& arguments) {
  std::optional<int> index;
  const bool indexing = INDEXING.count(plain) > 0;
  for (size_t i = 0; i < arguments.size(); ++i)
    each_tensor(arguments[i], [&](const Tensor& t) {
      if (!lies_here(t)) return;
      TORCH_CHECK(
          index.value_or(t.device().index()) == t.device().index(), "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cuda:1! (", name, ")");
      index = t.device().index();
    });
  if (!index) {
    for (auto& argument : arguments)
      if (argument.isDevice() && argument.toDevice().has_index()) return argument.toDevice().index();
    return current_device;
  }
  for (size_t i = 0; i < arguments.size(); ++i)
    if (!(indexing && i == 1))
      each_tensor(arguments[i], [&](const Tensor& t) {
        TORCH_CHECK(
            !t.defined() || lies_here(t) || (t.dim() == 0 && TAKE_HOST_SCALARS.count(plain)),
            "Expected all tensors to be on the same device, but found at least two devices, cuda:", *index, " and cpu! (", name, ")");
      });
  return *index;
}

void fallback(const c10::OperatorHandle& op, Stack* stack) {
  Held held;
  at::AutoDispatchBelowADInplaceOrView below;
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const auto& schema = op.schema();
  const std::string name = schema.name();
  TORCH_CHECK_NOT_IMPLEMENTED(
      name.rfind("aten::", 0) == 0 || name.rfind("prim", 0) == 0, "Could not run '", name, "' with arguments from the 'CUDA' backend.");
  const std::string bare = name.substr(name.find("::") + 2);
  const std::string plain = bare.size() > 1 && bare.back() == '_' && bare.rfind("__", 0) != 0 ? bare.substr(0, bare.size() - 1) : bare;
  const size_t count = schema.arguments().size();
  const std::vector<IValue> given(stack->end() - count, stack->end());
  const int device = device_of(name, plain, given);
  Graph* graph = capturing(device);

  bool waits_here = WAITING.count(plain) && !(plain == "repeat_interleave" && given.size() > 1 && !given[1].isNone());
  if (INDEXING.count(plain))
    each_tensor(given[1], [&](const Tensor& t) { waits_here |= t.defined() && (t.scalar_type() == at::kBool || !lies_here(t)); });
  if (waits_here) {
    if (graph) not_permitted(graph, name);
    wait(false);
  }

  Aliases aliases;
  bool writes = false;
  torch::jit::drop(*stack, count);
  for (size_t i = 0; i < count; ++i) {
    const auto* alias = schema.arguments()[i].alias_info();
    if (alias && alias->isWrite()) {
      writes = true;
      if (graph) each_tensor(given[i], [&](const Tensor& t) { if (lies_here(t)) keep(graph, t); });
    }
    stack->push_back(aliases.of(given[i]));
  }
  op.callBoxed(stack);

  // What the call has resized or given other strides in place.
  for (auto& [original, alias] : aliases.pairs) {
    auto* storage = original.storage().unsafeGetStorageImpl();
    if (alias.storage().data() != storage->data()) {
      TORCH_CHECK(!graph || graph->own.count(storage), "pretended: memory moved during a capture (", name, ").");
      auto fresh = allocate_on(device, alias.storage().nbytes());
      std::memcpy(fresh.get(), alias.storage().data(), alias.storage().nbytes());
      storage->set_data_ptr_noswap(std::move(fresh));
      storage->set_nbytes(alias.storage().nbytes());
    }
    if (alias.sizes() != original.sizes() || alias.strides() != original.strides())
      original.unsafeGetTensorImpl()->set_sizes_and_strides(alias.sizes(), alias.strides(), alias.storage_offset());
  }

  std::vector<Tensor> made;  // the results that have memory of their own, undefined in the place of others
  std::unordered_map<StorageImpl*, c10::Storage> moved;
  auto bring = [&](const Tensor& t) -> Tensor {
    made.emplace_back();
    if (!t.defined()) return t;
    for (auto& [original, alias] : aliases.pairs)
      if (alias.is_same(t)) return original;
    auto* impl = t.storage().unsafeGetStorageImpl();
    if (auto found = aliases.here.find(impl); found != aliases.here.end())
      for (auto& [original, alias] : aliases.pairs)
        if (alias.storage().unsafeGetStorageImpl() == impl) return tensor_in(found->second, t, original);
    // The native operator gives channels-last input back contiguous on CUDA.
    const Tensor source = plain.rfind("native_group_norm", 0) == 0 ? t.contiguous() : t;
    if (!moved.count(impl)) {
      const size_t bytes = source.storage().nbytes();
      c10::Storage storage(c10::Storage::use_byte_size_t(), bytes, allocate_on(device, bytes), &device_allocator, true);
      if (bytes) std::memcpy(storage.mutable_data(), source.storage().data(), bytes);
      belongs_to_capture(device, storage);
      moved.emplace(impl, storage);
    }
    return made.back() = tensor_in(moved.at(impl), source);
  };
  const size_t results = schema.returns().size();
  const std::vector<IValue> returned(stack->end() - results, stack->end());
  torch::jit::drop(*stack, results);
  for (auto& value : returned) {
    if (value.isTensor()) {
      stack->push_back(bring(value.toTensor()));
    } else if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& t : value.toTensorVector()) list.push_back(bring(t));
      stack->push_back(list);
    } else {
      stack->push_back(value);
    }
  }

  bool computes = writes;
  for (auto& t : made) computes |= t.defined();
  if (!graph || !computes || OF_SHAPES.count(bare)) return;
  Node node{name, nullptr, {}};
  Aliases again;  // anew: an output may have got its memory in the call
  std::vector<IValue> inputs;
  for (auto& value : given) {
    each_tensor(value, [&](const Tensor& t) { refer(graph, node, t); });
    inputs.push_back(again.of(value));
    if (value.isTensor() && value.toTensor().defined() && !lies_here(value.toTensor())) {  // the host's numbers are frozen
      Tensor frozen = value.toTensor().clone();
      if (value.toTensor().unsafeGetTensorImpl()->is_wrapped_number()) frozen.unsafeGetTensorImpl()->set_wrapped_number(true);
      inputs.back() = frozen;
    }
  }
  std::vector<Tensor> places;
  for (auto& t : made) places.push_back(t.defined() ? again.of(t) : t);
  node.run = [op, inputs, places]() {
    Stack call(inputs.begin(), inputs.end());
    op.callBoxed(&call);
    size_t i = 0;
    for (auto& value : call)
      each_tensor(value, [&](const Tensor& t) {
        if (places[i].defined()) places[i].copy_(t);
        ++i;
      });
  };
  graph->nodes.push_back(std::move(node));
}

int index_of(std::optional<Device> device) {
  const int index = device && device->has_index() ? device->index() : current_device;
  TORCH_CHECK(index < DEVICES, "CUDA error: invalid device ordinal");
  return index;
}

struct OnDevice {  // whose memory the allocator gives
  int before = current_device;
  explicit OnDevice(int index) { current_device = index; }
  ~OnDevice() { current_device = before; }
};

Tensor empty(
    c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<Device> device, std::optional<bool>,
    std::optional<at::MemoryFormat> format) {
  OnDevice on(index_of(device));
  Tensor t = at::detail::empty_generic(
      size, &device_allocator, c10::DispatchKeySet(c10::DispatchKey::CUDA), c10::dtype_or_default(dtype), format);
  belongs_to_capture(current_device, t.storage());
  return t;
}

Tensor empty_strided(
    c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<Device> device, std::optional<bool>) {
  OnDevice on(index_of(device));
  Tensor t = at::detail::empty_strided_generic(
      size, stride, &device_allocator, c10::DispatchKeySet(c10::DispatchKey::CUDA), c10::dtype_or_default(dtype));
  belongs_to_capture(current_device, t.storage());
  return t;
}

// Forward mode's zeros without memory.
Tensor efficient_zeros(
    c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<Device> device, std::optional<bool>) {
  at::native::ZeroTensorAllocator allocator(Device(CUDA, index_of(device)));
  auto keys = c10::DispatchKeySet(c10::DispatchKey::CUDA) | c10::DispatchKeySet(c10::DispatchKey::ZeroTensor);
  return at::detail::empty_generic(size, &allocator, keys, c10::dtype_or_default(dtype), std::nullopt);
}

Tensor& copy_(Tensor& self, const Tensor& src, bool non_blocking) {
  Held held;
  at::AutoDispatchBelowADInplaceOrView below;
  if (self.is_same(src) || self.numel() == 0) return self;
  const bool to = lies_here(self), from = lies_here(src), crosses = to != from;
  TORCH_CHECK((to || self.is_cpu()) && (from || src.is_cpu()), "copy_ between ", self.device(), " and ", src.device());
  Graph* graph = capturing(to ? self.device().index() : src.device().index());
  const Tensor& on_host = to ? src : self;
  const bool locked = crosses && (on_host.storage().nbytes() == 0 || is_pinned(on_host.storage().data()));
  Aliases aliases;
  Tensor target = to ? aliases.of(self) : self, source = from ? aliases.of(src) : src;
  if (graph) {
    if (crosses && !(locked && non_blocking)) not_permitted(graph, "Cannot copy between CPU and CUDA tensors unless pinned and non_blocking");
    if (to) keep(graph, self);
    Node node{"aten::copy_", [target, source]() mutable { target.copy_(source); }, {}};
    refer(graph, node, self), refer(graph, node, src);
    graph->nodes.push_back(std::move(node));
    if (!crosses) target.copy_(source);
    return self;
  }
  if (crosses && non_blocking && locked) {
    if (from) {
      pending.push_back({self.storage().getWeakStorageImpl(), target, at::empty_like(target).copy_(source), true});
      if (target.is_non_overlapping_and_dense()) std::memset(target.data_ptr(), POISON, target.nbytes());
      return self;
    }
    if (source.is_contiguous()) {
      Tensor place = at::from_blob(source.data_ptr(), source.sizes(), at::TensorOptions().dtype(source.dtype()));
      pending.push_back({src.storage().getWeakStorageImpl(), place, place.clone(), false});
    }
  } else if (crosses && !(to && non_blocking)) {
    wait(false);  // a copy from memory that can be paged is staged at once where it is not waited for
  }
  target.copy_(source);
  return self;
}

at::Scalar local_scalar_dense(const Tensor& self) {
  Held held;
  at::AutoDispatchBelowADInplaceOrView below;
  if (auto* graph = capturing(self.device().index())) not_permitted(graph, "a value that the host reads");
  wait(false);
  Aliases aliases;
  return aliases.of(self).item();
}

Tensor& set_storage(Tensor& self, c10::Storage source, int64_t offset, c10::IntArrayRef size, c10::IntArrayRef stride) {
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(source));
  std::vector<int64_t> dense(size.size(), 1);
  for (int64_t i = static_cast<int64_t>(size.size()) - 2; i >= 0; --i) dense[i] = dense[i + 1] * std::max<int64_t>(size[i + 1], 1);
  self.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride.empty() ? c10::IntArrayRef(dense) : stride, offset);
  return self;
}

Tensor& set_whole_storage(Tensor& self, c10::Storage source) {
  const auto n = static_cast<int64_t>(source.nbytes() / self.dtype().itemsize());
  return set_storage(self, std::move(source), 0, {n}, {1});
}

Tensor& set_tensor(Tensor& self, const Tensor& source) {
  return set_storage(self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

int64_t attention_by_definition(
    const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&, double, bool, std::optional<double>, bool) {
  return 0;
}

void record_stream(Tensor&, c10::Stream) {}

// ---------------------------------------------------------------- what torch asks of a device

c10::Stream stream_on(int device, int64_t id) { return c10::Stream(c10::Stream::UNSAFE, Device(CUDA, device), id); }

int64_t new_stream() {
  Held held;
  return ++last_stream;
}

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return CUDA; }
  Device exchangeDevice(Device device) const override {
    Device before(CUDA, current_device);
    current_device = index_of(device);
    return before;
  }
  Device getDevice() const override { return {CUDA, static_cast<c10::DeviceIndex>(current_device)}; }
  void setDevice(Device device) const override { current_device = index_of(device); }
  void uncheckedSetDevice(Device device) const noexcept override { current_device = device.index(); }
  c10::Stream getStream(Device device) const override { return stream_on(index_of(device), current_streams[index_of(device)]); }
  c10::Stream getDefaultStream(Device device) const override { return stream_on(index_of(device), 0); }
  c10::Stream getStreamFromGlobalPool(Device device, bool) const override { return stream_on(index_of(device), new_stream()); }
  c10::Stream getNewStream(Device device, int) const override { return stream_on(index_of(device), new_stream()); }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    const int device = stream.device_index();
    auto before = stream_on(device, current_streams[device]);
    current_streams[device] = stream.id();
    return before;
  }
  void record(void** event, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {
    *event = reinterpret_cast<void*>(1);
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  c10::DeviceIndex deviceCount() const noexcept override { return DEVICES; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream& stream) const override { wait_for_stream(stream.id()); }
  void synchronizeEvent(void*) const override { wait(true); }
  void synchronizeDevice(const c10::DeviceIndex) const override { wait_for_device(); }
};

C10_REGISTER_GUARD_IMPL(CUDA, Guard)

struct Hooks final : at::CUDAHooksInterface {
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasCUDART() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  bool isPinnedPtr(const void* data) const override { return is_pinned(data); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
  c10::Allocator* getCUDADeviceAllocator() const override { return &device_allocator; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override { return at::detail::getDefaultCPUGenerator(); }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::detail::createCPUGenerator(); }
  c10::DeviceIndex deviceCount() const override { return DEVICES; }
  int getNumGPUs() const override { return DEVICES; }
  c10::DeviceIndex current_device() const override { return static_cast<c10::DeviceIndex>(::current_device); }
  void setCurrentDevice(c10::DeviceIndex index) const override { ::current_device = index; }
  c10::DeviceIndex getCurrentDevice() const override { return static_cast<c10::DeviceIndex>(::current_device); }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex index) const override {
    const int before = ::current_device;
    if (index >= 0) ::current_device = index;
    return static_cast<c10::DeviceIndex>(before);
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex index) const override { return exchangeDevice(index); }
  void deviceSynchronize(c10::DeviceIndex) const override { wait_for_device(); }
};

// A launch of an interpreted kernel: Python runs it again at each replay, by its number.
void (*run_launch)(int64_t) = nullptr;

void record_launch(const std::string& name, int64_t number, const std::vector<Tensor>& used) {
  Held held;
  Graph* graph = capturing(used.at(0).device().index());
  TORCH_CHECK(graph && run_launch, "pretended: no capture");
  Node node{name, [number] { run_launch(number); }, {}};
  for (auto& t : used) refer(graph, node, t);
  graph->nodes.push_back(std::move(node));
}

Tensor host_alias(const Tensor& t) {
  at::AutoDispatchBelowADInplaceOrView below;
  Aliases aliases;
  return aliases.of(t);
}

}  // namespace

extern "C" void call_for_launches(void (*function)(int64_t)) { run_launch = function; }

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("_efficientzerotensor", efficient_zeros);
  m.impl("copy_", copy_);
  m.impl("_local_scalar_dense", local_scalar_dense);
  m.impl("set_.source_Storage_storage_offset", set_storage);
  m.impl("set_.source_Storage", set_whole_storage);
  m.impl("set_.source_Tensor", set_tensor);
  m.impl("record_stream", record_stream);
  m.impl("_fused_sdp_choice", attention_by_definition);
  // Composite operations whose parts look for a backend of CUDA's.
  for (const char* name :
       {"convolution", "convolution_backward", "convolution_overrideable", "native_group_norm", "native_group_norm_backward",
        "native_layer_norm", "native_layer_norm_backward", "silu_backward", "repeat_interleave.Tensor", "nan_to_num", "nan_to_num_", "equal"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

TORCH_LIBRARY(pretended, m) {
  m.def("install", [] {
    c10::SetAllocator(CUDA, &device_allocator);
    // torch has asked for its hooks while it was imported: the object that it keeps becomes these, which have no members either.
    static_assert(sizeof(Hooks) == sizeof(at::CUDAHooksInterface));
    new (const_cast<at::CUDAHooksInterface*>(&at::detail::getCUDAHooks())) Hooks();
  });
  m.def("current_device", []() -> int64_t { return current_device; });
  m.def("set_device", [](int64_t index) { current_device = index_of(Device(CUDA, static_cast<c10::DeviceIndex>(index))); });
  m.def("new_stream", new_stream);
  m.def("current_stream", [](int64_t device) -> int64_t { return current_streams[device]; });
  m.def("set_stream", [](int64_t device, int64_t stream) { current_streams[device] = stream; });
  m.def("wait_for_stream", wait_for_stream);
  m.def("wait_for_device", wait_for_device);
  m.def("forbid_waits", [](bool forbidden) { waits_forbidden = forbidden; });
  m.def("waits", []() -> int64_t { return waits; });
  m.def("is_capturing", []() -> bool {
    Held held;
    return capturing(current_device) != nullptr;
  });
  m.def("new_graph", []() -> int64_t {
    Held held;
    graphs[++last_graph] = std::make_unique<Graph>();
    return last_graph;
  });
  m.def("new_pool", []() -> int64_t {
    Held held;
    return ++last_pool;
  });
  m.def("begin_capture", begin_capture);
  m.def("end_capture", end_capture);
  m.def("replay", replay);
  m.def("drop_graph", [](int64_t id) {
    std::unique_ptr<Graph> dropped;
    Held held;
    if (auto found = graphs.find(id); found != graphs.end() && !captures.count(found->second->stream)) {
      dropped = std::move(found->second);
      graphs.erase(found);
    }
  });
  m.def("nodes", [](int64_t id) {
    Held held;
    std::vector<std::string> names;
    for (auto& node : graph_of(id).nodes) names.push_back(node.name);
    return names;
  });
  m.def("memory", [] { return std::vector<int64_t>{allocated_bytes, peak_bytes}; });
  m.def("set_limit", [](int64_t bytes) { limit_bytes = bytes; });
  m.def("reset_peak", [] { peak_bytes = allocated_bytes; });
  m.def("record_launch(str name, int number, Tensor[] used) -> ()");
  m.def("host_alias(Tensor t) -> Tensor");
}

TORCH_LIBRARY_IMPL(pretended, CUDA, m) {
  m.impl("record_launch", [](std::string name, int64_t number, at::TensorList used) { record_launch(name, number, used.vec()); });
  m.impl("host_alias", host_alias);
}
