// What the norms over the last dimension share: their rule, and the moments of rows that lie in parts on several devices.
#pragma once

#include "graph/op.h"
#include "graph/ops/moments.h"

namespace comfytp::graph {

/// x [.., c], `parameters` vectors [c], and maybe the gathered moments: rows are free, c is normalised over.
Rule row_norm_rule(const OpContext& op, std::size_t parameters);
/// How x [.., c] may lie where its rows count one by one: as it is made, if c is innermost.
Order rows_order(const Order& produced);
/// x lies so where no moments tell its rows' places.
Layout row_norm_layout(const OpContext& op, std::span<const Order> produced, std::size_t parameters);
/// Throws Error unless `moments` is f32 [parts, .., 3] for x [.., c].
void check_row_moments(std::string_view op, const Type& x, const Type& moments);

Moments<double> moments_of_row(const double* row, std::int64_t size);
/// Row r's moments, merged over the parts of [parts, rows, 3].
Moments<double> merged_row(const RefTensor& moments, std::int64_t r, std::int64_t rows);

}  // namespace comfytp::graph
