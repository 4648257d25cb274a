// What every binding needs: threads, scratch memory, addresses.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <thread>
#include <vector>

#include "kernels.hpp"

namespace gossamer {

constexpr int64_t kWorthAThread = 1 << 17;  // elements; a thread costs some 20 microseconds to start

// Calls body(part, begin, end) for `parts` equal stretches of [0, units).
template <typename Body>
void parallel(int64_t units, int64_t parts, const Body& body) {
  parts = std::max<int64_t>(1, std::min(parts, units));
  std::vector<std::thread> threads;
  for (int64_t p = 1; p < parts; ++p)
    threads.emplace_back([&, p] { body(p, units * p / parts, units * (p + 1) / parts); });
  body(0, 0, units / parts);
  for (auto& t : threads) t.join();
}

inline int64_t parts_for(int64_t elements, int64_t threads) { return std::min(threads, 1 + elements / kWorthAThread); }

template <typename T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Memory for one call, aligned to cache lines, not initialised.
template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t size) {
    const size_t bytes = (sizeof(T) * static_cast<size_t>(size) + 127) / 64 * 64;
    data_ = static_cast<T*>(std::aligned_alloc(64, bytes));
    if (data_ == nullptr) throw std::bad_alloc();
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* get() { return data_; }

 private:
  T* data_;
};

}  // namespace gossamer
