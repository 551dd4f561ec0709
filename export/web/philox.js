// The noise of a seed: Philox4x32-10 and Box-Muller, as docs state them. No BigInt: products of 32 bits are made of 16-bit halves.

const ROUND_A = 0xd2511f53, ROUND_B = 0xcd9e8d57, KEY_A = 0x9e3779b9, KEY_B = 0xbb67ae85;
const SAMPLING_STREAM = 16;

function high(a, b) {
  const a0 = a & 0xffff, a1 = a >>> 16, b0 = b & 0xffff, b1 = b >>> 16;
  const middle = a1 * b0 + ((a0 * b0) >>> 16);
  const other = a0 * b1 + (middle & 0xffff);
  return a1 * b1 + (middle >>> 16) + (other >>> 16);
}

// The four words, each in [0, 2^32), of one counter [i, position low, position high, stream] under a key [low, high].
export function philoxWords(counter, key) {
  let [c0, c1, c2, c3] = counter;
  let [k0, k1] = key;
  for (let round = 0; round < 10; round++) {
    const high0 = high(c0, ROUND_A), low0 = Math.imul(c0, ROUND_A), high2 = high(c2, ROUND_B), low2 = Math.imul(c2, ROUND_B);
    c0 = (high2 ^ c1 ^ k0) >>> 0;
    c2 = (high0 ^ c3 ^ k1) >>> 0;
    c1 = low2 >>> 0;
    c3 = low0 >>> 0;
    k0 = (k0 + KEY_A) >>> 0;
    k1 = (k1 + KEY_B) >>> 0;
  }
  return [c0, c1, c2, c3];
}

// The two words [low, high] of a seed's decimal text, -2^63 to 2^64 - 1, negative ones in two's complement; RangeError for any other text.
export function seedWords(text) {
  const match = /^\s*([+-]?)0*(\d{1,20})\s*$/.exec(text);
  if (!match) throw new RangeError(`not a whole number of 64 bits: ${text}`);
  let low = 0, high = 0;
  for (const digit of match[2]) {
    const product = low * 10 + Number(digit); // below 2^53
    low = product % 0x100000000;
    high = high * 10 + Math.floor(product / 0x100000000);
  }
  const negative = match[1] === "-";
  const fits = negative ? high < 0x80000000 || (high === 0x80000000 && low === 0) : high < 0x100000000;
  if (!fits) throw new RangeError(`not a whole number of 64 bits: ${text}`);
  if (!negative) return [low, high];
  const low2 = (~low + 1) >>> 0;
  return [low2, (~high + (low2 === 0 ? 1 : 0)) >>> 0];
}

// count unit normals, Float32Array, of a seed before sampling step `step`: lane l of counter i is element l * ceil(count / 4) + i.
export function normals(seed, count, step = 0) {
  const key = seedWords(seed), quarter = Math.ceil(count / 4), out = new Float32Array(4 * quarter);
  for (let i = 0; i < quarter; i++) {
    const words = philoxWords([i, 0, 0, SAMPLING_STREAM + step], key);
    for (let pair = 0; pair < 2; pair++) {
      const u = ((words[2 * pair] >>> 9) + 0.5) / 0x800000;
      const angle = (2 * Math.PI * (words[2 * pair + 1] >>> 8)) / 0x1000000;
      const radius = Math.sqrt(-2 * Math.log(u));
      out[2 * pair * quarter + i] = radius * Math.cos(angle);
      out[(2 * pair + 1) * quarter + i] = radius * Math.sin(angle);
    }
  }
  return out.subarray(0, count);
}

// The field at `fraction` of the way from `start` to `end` along their great circle.
export function slerp(start, end, fraction) {
  let product = 0, first = 0, second = 0;
  for (let i = 0; i < start.length; i++) {
    product += start[i] * end[i];
    first += start[i] * start[i];
    second += end[i] * end[i];
  }
  const angle = Math.acos(Math.min(1, Math.max(-1, product / Math.sqrt(first * second))));
  const flat = angle < 1e-4; // the same field twice: the circle is a point
  const a = flat ? 1 - fraction : Math.sin((1 - fraction) * angle) / Math.sin(angle);
  const b = flat ? fraction : Math.sin(fraction * angle) / Math.sin(angle);
  return start.map((value, i) => a * value + b * end[i]);
}
