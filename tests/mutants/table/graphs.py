"""Mutants of the CUDA graphs of an inverter."""

from tests.mutants.mutant import Mutant, of_file

MUTANTS = (
    *of_file(
        "smi_fast/inversion/loop.py",
        "tests/inversion/test_graphs.py",
        Mutant(
            "loop-scored-in-graph",
            "(check if scored is None else min(check, scored)) - number",
            "check - number",
            "A graph runs past the iteration that scores importance.",
        ),
    ),
    *of_file(
        "smi_fast/inversion/graphs.py",
        "tests/inversion/test_graphs.py",
        Mutant(
            "graphs-adopt",
            "setattr(state, name, self._tensors[kind].copy_(own))",
            "setattr(state, name, self._tensors[kind])",
            "The second batch goes on from the first one.",
        ),
        Mutant(
            "graphs-give-back",
            "setattr(state, name, own.clone())",
            "setattr(state, name, own)",
            "The next batch overwrites a result.",
        ),
        Mutant(
            "graphs-weights",
            "if self._weights is not None and self._weights.changed():",
            "if False:",
            "Graphs go on with weights that were changed.",
        ),
        Mutant(
            "graphs-hold",
            "self._held[key] = state.settings.teacher.derived()",
            "self._held[key] = ()",
            "A graph reads folded weights whose memory is another's by now.",
        ),
        Mutant(
            "graphs-subclass",
            "type(objective) in STATELESS for objective",
            "isinstance(objective, STATELESS) for objective",
            "A graph of one batch reads what an objective held then.",
        ),
        Mutant(
            "graphs-nested",
            "if not self._lock.acquire(blocking=False):",
            "if self._lock.acquire(blocking=False) and False:",
            "An inversion in a callback overwrites the state of the outer one.",
        ),
        Mutant(
            "graphs-worth",
            "self._taken[due] - count + left < WORTH",
            "left < WORTH",
            "Short phases are never captured, however many batches they have.",
        ),
        Mutant(
            "graphs-large-due",
            "always = all(objective.every == 1 for objective in settings.objectives)",
            "always = True",
            "A term of every third iteration is in all ten of a graph, or in none.",
        ),
        Mutant(
            "graphs-large-worth",
            "self._taken[due] + left >= STEPS * WORTH",
            "True",
            "Ten iterations are captured for a phase of twenty.",
        ),
        Mutant(
            "graphs-large-count",
            "        return count\n",
            "        return 1\n",
            "Iterations that a graph has taken are taken again.",
        ),
        Mutant(
            "graphs-named",
            "if isinstance(owner, Objective):",
            "if False:",
            "Of several objectives nobody knows which one can't be captured.",
        ),
        Mutant(
            "graphs-autocast",
            'torch.is_autocast_enabled("cuda"),',
            "",
            "A graph that was captured under autocast serves a batch without it.",
        ),
        Mutant(
            "graphs-bound",
            "if key not in self._phases and len(self._phases) >= MOST:",
            "if False:",
            "The memory of graphs grows with every size of a batch.",
        ),
    ),
    *of_file(
        "smi_fast/engine/weights.py",
        "tests/inversion/test_graphs.py",
        Mutant(
            "weight-copy-address",
            "if any(a.data_ptr() != b.data_ptr() for",
            "if any(a.shape != b.shape for",
            "Weights that moved with their values go unnoticed, and graphs read the old place.",
        ),
        Mutant(
            "weight-copy-values",
            "return bool(torch.stack(others).any())",
            "return bool(torch.stack(others).all())",
            "A change of one weight goes unnoticed.",
        ),
    ),
    *of_file(
        "smi_fast/inversion/cuda_graph.py",
        "tests/inversion/test_cuda_graph.py",
        Mutant(
            "graph-pool",
            "graph(graph, pool=memory.pool, stream=memory.stream)",
            "graph(graph, stream=memory.stream)",
            "Each graph has a pool of memory to itself.",
        ),
        Mutant(
            "graph-warm",
            "self._memory.warm = True",
            "pass",
            "Every capture is preceded by three iterations one by one.",
        ),
    ),
)
