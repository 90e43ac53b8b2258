#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "base/error.hpp"
#include "store/expert_store.hpp"

namespace spmoe {

/// Python's `ExpertStore`: a store until `close`, and its sizes for good. Guarded by the GIL.
class BoundStore {
 public:
  explicit BoundStore(std::shared_ptr<const ExpertStore> store)
      : format{store->format()},
        layer_count{store->layer_count()},
        expert_count{store->expert_count()},
        tensor_names{store->tensor_names()},
        store_{std::move(store)} {}

  /// @throws Error once closed.
  [[nodiscard]] std::shared_ptr<const ExpertStore> get() const {
    if (store_ == nullptr) throw Error{"this store is closed; open the checkpoint again"};
    return store_;
  }

  /// Closes the files, unless runtimes over them are open: then the last of these does.
  void close() noexcept { store_.reset(); }

  const BlobFormat format;
  const std::uint16_t layer_count;
  const std::uint16_t expert_count;
  const std::vector<std::string> tensor_names;

 private:
  std::shared_ptr<const ExpertStore> store_;
};

}  // namespace spmoe
