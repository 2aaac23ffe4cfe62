#include <algorithm>

#include "graph/rewrites.h"
#include "graph/rewrites/passes.h"

namespace comfytp::graph {

std::vector<bool> varies_per_call(const Graph& graph) {
  const auto& nodes = graph.nodes();
  std::vector<bool> varies(nodes.size()), prompt(nodes.size()), fetched(nodes.size());
  for (std::size_t i = 0; i < nodes.size(); ++i) {
    const bool input = is(nodes[i], "input");
    varies[i] = input && nodes[i].attrs.text_or("varies", "call") == "call";
    prompt[i] = input && !varies[i];
    fetched[i] = is(nodes[i], "fetch_weight");
    for (ValueId id : nodes[i].inputs) {
      const auto from = static_cast<std::size_t>(graph.value(id).node);
      varies[i] = varies[i] || varies[from];
      prompt[i] = prompt[i] || prompt[from];
      fetched[i] = fetched[i] || fetched[from];
    }
  }
  const auto read_by = readers(graph);
  for (std::size_t i = nodes.size(); i-- > 0;) {
    if (!fetched[i] || prompt[i] || varies[i]) continue;
    bool read = false, only_by_calls = true;
    for (ValueId id : nodes[i].outputs)
      for (int user : read_by[static_cast<std::size_t>(id)]) {
        read = true;
        only_by_calls = only_by_calls && user >= 0 && varies[static_cast<std::size_t>(user)];
      }
    varies[i] = read && only_by_calls;
  }
  return varies;
}

}  // namespace comfytp::graph
