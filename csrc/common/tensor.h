// What a kernel knows of a tensor: a pointer, a dtype, a shape, strides, a device. No framework, no Python.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>

namespace clustops {

enum class DType { f32, f64, bf16, f16, i32, i64 };
enum class Device { cpu, cuda };

inline const char* name_of(DType dtype) {
  static const char* const names[] = {"float32", "float64", "bfloat16", "float16", "int32", "int64"};
  return names[static_cast<int>(dtype)];
}

struct Tensor {
  static constexpr int kMaxDims = 8;

  void* data = nullptr;
  DType dtype = DType::f32;
  Device device = Device::cpu;
  int device_index = 0;
  int dims = 0;
  int64_t shape[kMaxDims] = {};
  int64_t strides[kMaxDims] = {};  // in elements; a dimension of size 0 or 1 may have any

  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }

  // From dimension `first` on, elements lie one after the other in row-major order.
  bool contiguous_from(int first) const {
    int64_t expected = 1;
    for (int i = dims - 1; i >= first; --i) {
      if (shape[i] == 0) return true;
      if (shape[i] != 1 && strides[i] != expected) return false;
      expected *= shape[i];
    }
    return true;
  }
};

inline std::string text_of(std::initializer_list<int64_t> shape) {
  std::string text = "[";
  for (int64_t size : shape) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + "]";
}

// The backstop behind the checks in Python: a mistake there is an exception here, never a crash.
inline void expect(const Tensor& tensor, const char* name, DType dtype, Device device,
                   std::initializer_list<int64_t> shape, int contiguous_from = 0) {
  const auto fail = [&](const std::string& what) { throw std::invalid_argument(std::string(name) + " must " + what); };
  if (tensor.dtype != dtype) fail(std::string("be ") + name_of(dtype) + ", got " + name_of(tensor.dtype));
  if (tensor.device != device) fail(device == Device::cpu ? "be in host memory" : "be on a CUDA device");
  bool same = tensor.dims == static_cast<int>(shape.size());
  for (int i = 0; same && i < tensor.dims; ++i) same = tensor.shape[i] == shape.begin()[i];
  if (!same) fail("have shape " + text_of(shape));
  if (!tensor.contiguous_from(contiguous_from)) fail("be contiguous from dimension " + std::to_string(contiguous_from));
}

inline void expect_dims(const Tensor& tensor, const char* name, int dims) {
  if (tensor.dims != dims) {
    throw std::invalid_argument(std::string(name) + " must have " + std::to_string(dims) + " dimensions, got " +
                                std::to_string(tensor.dims));
  }
}

}  // namespace clustops
