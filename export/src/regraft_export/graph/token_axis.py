"""Follows the token axis through a graph and finds every baked token count on its way.

Each tensor behind the token entry gets its dimensions twice: before (T tokens) and after (T + R).
Where a node's target shape is baked and says T, the node cannot follow, and the constant must be
mended. What cannot be decided is an error that names the node: a wrong guess would give wrong
features without any message.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import onnx_graphsurgeon as gs

from regraft.errors import RewriteError
from regraft_export.graph import shape_values
from regraft_export.graph.dims import Dims
from regraft_export.graph.shape_arithmetic import COMPUTED, evaluate
from regraft_export.graph.shape_values import Baked, Elements, elements_of, plain
from regraft_export.graph.token_rules import CONTRIBUTED_RULES, RULES, STANDARD_DOMAINS

TRIAL_BATCH = 5  # any size works; a prime is seldom another dimension by chance


@dataclass
class TokenAxis:
    """The analysis of one graph.

    Attributes:
        tokens: where the registers are appended.
        shape: (T, D) of the tokens.
        registers: R.
        start: dimensions of ``tokens``; None for (B, T, D).
        known: dimensions of tensors before the registers, by id, where the file declares none.
        dims: dimensions of every tensor that was visited, by id; given at first for tensors that
            enter the network beside the tokens and grow with them.
        settled: baked element -> what the nodes that depend on it need it to be.
        grown: element that the graph computes from something else than the tokens, as from the
            size of the image -> how much is to be added to it.
    """

    tokens: gs.Variable
    shape: tuple[int, int]
    registers: int
    start: Dims | None = None
    known: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    dims: dict[int, Dims] = field(default_factory=dict)
    elements: dict[int, Elements] = field(default_factory=dict)
    settled: dict[Baked, int] = field(default_factory=dict)
    grown: dict[Baked, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        T, D = self.shape
        in_rows = Dims((TRIAL_BATCH, T, D), (TRIAL_BATCH, T + self.registers, D))
        self.dims[id(self.tokens)] = self.start or in_rows

    def visit(self, node: gs.Node) -> None:
        """Works out a node's outputs; nodes must come in topological order.

        Raises:
            RewriteError: the node reads tokens and what becomes of them cannot be decided.
        """
        if node.op == "Shape":
            self._shape(node)
            return
        if any(id(t) in self.dims for t in node.inputs):
            for output, dims in zip(node.outputs, self._outputs(node), strict=False):
                self.dims[id(output)] = dims
            return
        inputs = [self._elements(node, i) for i in range(len(node.inputs))]
        values = evaluate(node, inputs)
        if values is None:
            return
        self.elements[id(node.outputs[0])] = values
        if node.op in COMPUTED:
            # The result keeps no trace of the constants it was computed from, so they must stay.
            for given in inputs:
                self._settle_all(node, given)

    def _shape(self, node: gs.Node) -> None:
        dims = self._known(node.inputs[0])
        if dims is not None:
            values = shape_values.from_shape(node, dims.before, dims.after)
            self.elements[id(node.outputs[0])] = values

    def _elements(self, node: gs.Node, slot: int) -> Elements | None:
        value = node.inputs[slot]
        if isinstance(value, gs.Constant):
            return shape_values.from_constant(value, node, slot)
        return self.elements.get(id(value))

    def _known(self, value: gs.Tensor) -> Dims | None:
        """Dimensions of any tensor: visited, constant, or declared in the file."""
        if id(value) in self.dims:
            return self.dims[id(value)]
        if id(value) in self.known:
            return Dims(self.known[id(value)], self.known[id(value)])
        if value.shape is None:
            return None
        declared = tuple(d if isinstance(d, int) else TRIAL_BATCH for d in value.shape)
        return Dims(declared, declared)

    def need(self, node: gs.Node, slot: int) -> Dims:
        """Dimensions of an input that must be known."""
        dims = self._known(node.inputs[slot])
        if dims is None:
            raise self.undecided(node, f"the shape of its input {node.inputs[slot].name!r}")
        return dims

    def values(self, node: gs.Node, slot: int, what: str) -> Elements:
        """Integer elements of an input that must be known."""
        elements = self._elements(node, slot)
        if elements is None:
            raise self.undecided(node, f"its {what} ({node.inputs[slot].name!r})")
        return elements

    def numbers(self, node: gs.Node, slot: int, what: str) -> list[int]:
        """Integers of an input that must be known and must not depend on the token count."""
        elements = self.values(node, slot, what)
        if any(element.before != element.after for element in elements_of(elements)):
            raise self.undecided(node, f"its {what}, computed from the token count,")
        self._settle_all(node, elements)
        return plain(elements)

    def differs(self, value: gs.Tensor) -> bool:
        """Whether a small tensor's numbers, known to the walk, change with the token count."""
        elements = self.elements.get(id(value))
        return elements is not None and any(e.before != e.after for e in elements_of(elements))

    def undecided(self, node: gs.Node, what: str) -> RewriteError:
        """The error for a node that cannot be followed."""
        return RewriteError(
            f"node {node.name!r} ({node.op}) reads tokens and {what} cannot be decided once a "
            "register is appended; export the model again without constants for its token count, "
            "or report this node"
        )

    def _outputs(self, node: gs.Node) -> list[Dims]:
        rules = RULES if node.domain in STANDARD_DOMAINS else CONTRIBUTED_RULES
        rule = rules.get(node.op)
        if rule is None:
            raise self.undecided(node, "what this operator does to them")
        return rule(self, node)

    def expect(
        self, node: gs.Node, place: int, element: shape_values.Element, wanted: tuple[int, int]
    ) -> None:
        """Makes element ``place`` of a target (input 1) follow: nothing to do, a mend, or an error.

        A count of tokens alone may be computed from what does not grow: then R is added to it. What
        is a multiple of it cannot be told from other numbers.
        """
        if element.before in (0, -1):
            return
        if element.origin is not None:
            self._settle(node, element.origin, element.before, wanted[1])
        elif element.after != wanted[1]:
            more = wanted[1] - element.before
            if element.after != element.before or more != self.registers:
                raise self.undecided(node, f"its target dimension {element.before}")
            self.grown[Baked(node, 1, place)] = more

    def _settle_all(self, node: gs.Node, elements: Elements | None) -> None:
        """The constants behind these elements must stay as they are."""
        for element in () if elements is None else elements_of(elements):
            if element.origin is not None:
                self._settle(node, element.origin, element.before, element.before)

    def _settle(self, node: gs.Node, origin: Baked, before: int, wanted: int) -> None:
        # Shape arithmetic may carry one element to several nodes, which then must agree.
        if self.settled.setdefault(origin, wanted) != wanted:
            raise self.undecided(node, f"a shared constant, {before},")


Rule = Callable[[TokenAxis, gs.Node], list[Dims]]
"""What a kind of operator does to the token axis: a node -> the dimensions of its outputs."""
