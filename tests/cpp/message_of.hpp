#pragma once

#include <string>

namespace spmoe {

/// The message of the `Exception` that `call` throws. Another exception passes through.
template <class Exception, class Call>
std::string message_of(Call call) {
  try {
    call();
  } catch (const Exception& error) {
    return error.what();
  }
  return "nothing was thrown";
}

}  // namespace spmoe
