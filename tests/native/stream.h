// Arrays that come in on stdin and go out on stdout, each in memory of exactly its size.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

template <class T>
std::vector<T> read(int64_t count) {
  std::vector<T> values(static_cast<std::size_t>(count));
  if (count > 0 && std::fread(values.data(), sizeof(T), values.size(), stdin) != values.size()) std::exit(3);
  values.shrink_to_fit();
  return values;
}

template <class T>
void write(const std::vector<T>& values) {
  if (!values.empty()) std::fwrite(values.data(), sizeof(T), values.size(), stdout);
}
