// A CUDA device for a build of torch without CUDA, whose tensors are fake tensors and hold no memory.
//
// Autograd asks a device's guard for its streams and events, and torch's Python bindings ask the hooks how many
// devices there are. Both answer here for a machine with one device on which all work has already ended.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::Stream;

constexpr DeviceIndex kIndex = 0;

struct OneDeviceGuard final : public c10::impl::DeviceGuardImplInterface {
  static Stream stream() { return Stream(Stream::DEFAULT, Device(DeviceType::CUDA, kIndex)); }

  DeviceType type() const override { return DeviceType::CUDA; }
  Device exchangeDevice(Device) const override { return getDevice(); }
  Device getDevice() const override { return Device(DeviceType::CUDA, kIndex); }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  DeviceIndex deviceCount() const noexcept override { return 1; }

  Stream getStream(Device) const noexcept override { return stream(); }
  Stream getDefaultStream(Device) const override { return stream(); }
  Stream exchangeStream(Stream) const noexcept override { return stream(); }
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}

  void record(void**, const Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
};

const c10::impl::DeviceGuardImplRegistrar registrar(DeviceType::CUDA, new OneDeviceGuard());

}  // namespace

namespace at {

struct OneDeviceHooks final : public CUDAHooksInterface {
  explicit OneDeviceHooks(CUDAHooksArgs) {}

  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  int getNumGPUs() const override { return 1; }
  DeviceIndex current_device() const override { return kIndex; }
  DeviceIndex getCurrentDevice() const override { return kIndex; }
  void setCurrentDevice(DeviceIndex) const override {}
  DeviceIndex exchangeDevice(DeviceIndex) const override { return kIndex; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return kIndex; }
  void deviceSynchronize(DeviceIndex) const override {}
};

C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, OneDeviceHooks);

}  // namespace at
