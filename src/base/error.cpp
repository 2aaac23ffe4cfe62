#include "base/error.h"

#include <new>

namespace comfytp {

void rethrow_from(std::string_view where) {
  const auto text = [&](const char* what) { return fmt::format("{}: {}", where, what); };
  try {
    throw;
  } catch (const Cancelled& e) {
    throw Cancelled(text(e.what()));
  } catch (const Timeout& e) {
    throw Timeout(text(e.what()));
  } catch (const OutOfMemory& e) {
    throw OutOfMemory(text(e.what()));
  } catch (const DeviceFailure& e) {
    throw DeviceFailure(text(e.what()));
  } catch (const std::bad_alloc&) {
    throw OutOfMemory(text("the system has no more memory"));
  } catch (const std::exception& e) {
    throw Error(text(e.what()));
  }
}

}  // namespace comfytp
