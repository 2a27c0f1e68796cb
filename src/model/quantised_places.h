// Which parameters of a model are held in 8 or 4 bits, in which form, and how panels are made of them.
#pragma once

#include <span>
#include <string>
#include <utility>
#include <vector>

#include "base/threads.h"
#include "checkpoint/tensor_source.h"
#include "model/background_layout.h"
#include "model/importance.h"
#include "model/quantised.h"
#include "model/transformer.h"

namespace latente {

// A matrix or a stack of them.
struct QuantisedPlace {
  std::string path;    // of the tensor
  std::string source;  // what it is made of: itself, or of absorbed halves kv_b_proj, k_b_proj or v_b_proj
  Tensor tensor;
  View view;          // without data: as panels, or rows of floats of absorbed halves
  int64_t bytes = 0;  // of them
  // Of the absorbed halves: a head's rows in the source, and whether they are read transposed.
  int64_t first = 0, stride = 0;
  bool transposed = false;

  int64_t matrices() const { return view.shape.rank() == 3 ? view[0] : 1; }
  int64_t rows() const { return view[-2]; }
  int64_t columns() const { return view[-1]; }
  // The checkpoint's name of what matrix i is made of, and that matrix's rows.
  std::string source_of(int64_t i) const;
  int64_t source_rows() const { return stride > 0 ? matrices() * stride : rows(); }
};

struct QuantisedPlaces {
  std::vector<QuantisedPlace> places;
  std::vector<std::pair<std::string, Tensor>> kept;  // (path, tensor): parameters in their own type
  int64_t bytes() const;                             // of all
};

// Error for options without sense, or when the backend does not know the form.
QuantisedPlaces quantised_places(Transformer& model, Backend& backend, const QuantisedOptions& options);

// As blocks() of the source has them (model/quantised.h, load_as_stored); gives the parameters their types.
QuantisedPlaces stored_places(Transformer& model, Backend& backend, const TensorSource& source);

// Gives a place's tensor its panels from the host's memory, laid out for another device.
void take_panels(const QuantisedPlace& place, const void* panels, Backend& device);

// What is quantised at a time: some matrices whole, or some rows of one.
struct QuantisedPiece {
  int64_t matrix = 0, matrices = 1;
  int64_t row = 0, rows = 0;
};
// In the order of their panels, which fill the place without gaps.
std::vector<QuantisedPiece> pieces_of(const QuantisedPlace& place);

// The panels of pieces of places, by all threads.
class QuantisedPanels {
 public:
  explicit QuantisedPanels(Backend& backend) : backend_(backend) {}
  virtual ~QuantisedPanels() = default;

  int64_t bytes(const QuantisedPlace& place, const QuantisedPiece& piece) const;
  void make(const QuantisedPlace& place, const QuantisedPiece& piece, void* panels);
  // All of a place.
  void make(const QuantisedPlace& place, void* panels);

 protected:
  // Rows [row, row + rows) of matrix `matrix`, to be matrix `index` of `to` from row `to_row` on. Called from
  // several threads at once.
  virtual void make_rows(const QuantisedPlace& place, int64_t matrix, int64_t row, int64_t rows,
                         const View& to, int64_t index, int64_t to_row) = 0;
  virtual void made(const QuantisedPlace&, const QuantisedPiece&) {}
  Backend& backend() { return backend_; }

 private:
  Backend& backend_;
  ThreadPool pool_;
};

// What lays a place's matrices out from the blocks that they are stored in; null where these have no exact
// form in the place's type, or another shape.
std::unique_ptr<MatricesInFile> matrices_in_blocks(const QuantisedPlace& place, const TensorSource& source,
                                                   Backend& backend);

// Of a checkpoint's codes where it has them in a place's form, else of its values. Error naming the matrix
// when one is not finite.
class CheckpointPanels final : public QuantisedPanels {
 public:
  CheckpointPanels(Backend& backend, const TensorSource& checkpoint, const Importance* importance = nullptr)
      : QuantisedPanels(backend), checkpoint_(checkpoint), importance_(importance) {}

 private:
  void make_rows(const QuantisedPlace& place, int64_t matrix, int64_t row, int64_t rows, const View& to,
                 int64_t index, int64_t to_row) override;
  void made(const QuantisedPlace& place, const QuantisedPiece& piece) override;
  // Rows [first, first + rows) of a matrix; false when it has no such codes.
  bool take_codes(const QuantisedPlace& place, const std::string& name, int64_t first, int64_t rows,
                  const View& to, int64_t index, int64_t to_row);
  const TensorSource& checkpoint_;
  const Importance* importance_;  // or null
};

}  // namespace latente
