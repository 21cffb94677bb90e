"""The result of a comparison: a row for each tensor, and the conclusion from all of them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from ..files.strict_json import finite_or_null
from .bits import Difference, NotFinite
from .budget import Error
from .logits import LogitsVerdict

EXACT = "exact"
OK, GUILTY, SUSPECT, INHERITED, DIFFERENT = "ok", "guilty", "suspect", "inherited", "different"
MIXER, MLP, RESIDUAL, LAYER, ENDS = "mixer", "mlp", "residual", "layer", "ends"
NEAR_TIE, FOLLOWS, WRONG = "near-tie", "follows its logits", "wrong"


@dataclass(frozen=True)
class Match:
    """A mistake that gives the candidate's values.

    share   the distance from them as a share of the tensor's budget, up to 1
    left    0; or, where the share is more than 1, the part of the candidate's error that the mistake leaves
    """

    name: str
    share: float
    left: float = 0.0

    def __str__(self):
        return self.name


@dataclass(frozen=True)
class Flip:
    """A token for which the router of the candidate chose other experts than the reference.

    margin    how far apart the two choices are in the reference's logits: 0 is a tie
    allowed   the margin that the budget explains
    kind      "near-tie"; "follows its logits": they are wrong, the choice among them is right; "wrong"
    assumed   the trace does not hold the choice: it is the one that explains the tensors after it
    """

    name: str
    token: int
    reference: list[int]
    candidate: list[int]
    margin: float
    allowed: float
    kind: str
    assumed: bool = False

    def __str__(self):
        assumed = ", assumed: the choice is not in the trace" if self.assumed else ""
        return (
            f"{self.name} token {self.token}: experts {self.candidate}, want {self.reference}: "
            f"{self.kind}, margin {self.margin:.2g}, allowed {self.allowed:.2g}{assumed}"
        )


@dataclass(frozen=True)
class Place:
    """Where a tensor is beyond its budget: indices [token, feature].

    first   the first element beyond the budget; None where only all of them together are
    worst   the element that is furthest off; want, got its values, share its error as part of the budget
    not_finite   NaN or infinity where the reference has numbers
    """

    first: tuple[int, ...] | None
    worst: tuple[int, ...]
    want: float
    got: float
    share: float
    not_finite: NotFinite | None = None

    def __str__(self):
        start = "" if self.first is None else f"from token {self.first[0]}; "
        if self.not_finite:
            return f"{start}{self.not_finite}"
        return (
            f"{start}worst at {list(self.worst)}: want {self.want:.9g}, got {self.got:.9g}, "
            f"{self.share:.2g} times the budget"
        )


@dataclass(frozen=True)
class Row:
    """One tensor.

    status        ok; guilty: wrong on the candidate's own inputs; suspect: the same, but some inputs are
                  not in the trace: it or anything before it; inherited; different: nothing was run again
    error, own    from the reference, end to end and of the operation on the candidate's inputs
    total_share, own_share  of the budget: more than 1 is beyond it; None without a budget
    scale         root mean square of the reference's values
    difference    in bits, where they differ
    token         the first that is beyond the budget, or None
    place         where it is beyond the budget, or None
    by_token, own_by_token  the largest error of each row, as part of the budget's: end to end, and of the
                  operation on the candidate's inputs; () without a budget
    rows          the tokens of the rows, of a tensor that holds a part of them; () all
    inherited_share  of the budget end to end: the error of what the right operation makes of the
                  candidate's inputs
    """

    name: str
    status: str
    scale: float
    error: Error | None
    own: Error | None
    total_share: float | None
    own_share: float | None
    difference: Difference | None
    token: int | None
    place: Place | None = None
    by_token: tuple[float, ...] = ()
    own_by_token: tuple[float, ...] = ()
    rows: tuple[int, ...] = ()
    inherited_share: float | None = None

    @property
    def detail(self) -> str:
        """Where it differs, in words; empty where it does not."""
        if self.place is not None:
            return f"{self.name}: {self.place}"
        return str(self.difference or "")


@dataclass(frozen=True)
class Nearest:
    """The budget that a trace which is not bit-equal was tried with.

    share   of the budget, of the tensor that uses most of it; within: every tensor is within it
    first   the first tensor beyond it, or None
    """

    budget: str
    share: float
    within: bool
    tensor: str
    first: str | None


@dataclass(frozen=True)
class Search:
    """Known mistakes tried, of how many; `start`: the tensor, or "the ids", from which on they were run.

    stopped: the time allowed ran out before all were tried
    """

    tried: int
    known: int
    start: str
    stopped: bool


@dataclass(frozen=True)
class BlockError:
    """layer   its number; -1: the embedding; the count of layers: the head
    block      one of MIXER, MLP, RESIDUAL, LAYER, ENDS
    name       of the tensor that it puts out
    added      the error of the block alone, as a share of its budget: more than 1 is beyond it
    inherited  the error of what the right block makes of the candidate's input, as a share of the budget end
               to end
    total      the error of both, as a share of the budget end to end
    """

    layer: int
    block: str
    name: str
    added: float
    inherited: float
    total: float


@dataclass(frozen=True)
class TokenError:
    """The largest error that a block adds at a token, as a share of its budget; name: of what it puts out."""

    token: int
    name: str
    added: float


@dataclass(frozen=True)
class Routing:
    """The error of the last tensor that was compared, as a share of its budget end to end.

    as_it_is       the reference goes on with its own choices of experts
    near_ties      it goes on with the candidate's where they are near-ties: what the verdict is made of
    every_choice   it goes on with every choice that the candidate made
    """

    tensor: str
    as_it_is: float
    near_ties: float
    every_choice: float


@dataclass(frozen=True)
class Added:
    """blocks in the order of execution; tokens: of each, the block that adds most there; routing: None where
    the same experts were chosen."""

    blocks: list[BlockError]
    tokens: list[TokenError]
    routing: Routing | None

    @property
    def beyond(self) -> list[BlockError]:
        """Those that add more than their budget, the largest first."""
        return sorted((b for b in self.blocks if b.added > 1), key=lambda b: -b.added)


@dataclass(frozen=True)
class Floor:
    """What the same engine does to the unquantized model: its error is subtracted from the candidate's.

    share    of the budget, end to end, of the tensor that uses most of it
    beyond   how many tensors are beyond the budget, the first of them, or None
    """

    path: str
    share: float
    tensor: str
    beyond: int
    first: str | None


@dataclass(frozen=True)
class Verdict:
    """ok; rows in the order of execution; flips; names that only one side has; the mistakes that fit.

    budget     "exact" or the dtype of the budget; rerun: operations were run again
    unchecked  tensors that were not compared, and that no compared one is computed from
    between    tensors between the first guilty or suspect one and its inputs that are not in the trace
    next       those of them that would tell most
    nearest    of "exact": the budget that the candidate is within, or the last that was tried
    hints      further remarks, one line each
    logits     of lm_head, where it was compared and differs: what the logits alone tell; needs a budget
    added      which block adds the error, where that was asked for
    floor      of the engine, where one was given: the budget and the floor together are what is allowed
    """

    ok: bool
    budget: str
    factor: float | None
    rows: list[Row]
    flips: list[Flip]
    missing: list[str]
    unknown: list[str]
    rerun: bool
    mistakes: list[Match] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    between: list[str] = field(default_factory=list)
    next: list[str] = field(default_factory=list)
    search: Search | None = None
    nearest: Nearest | None = None
    hints: list[str] = field(default_factory=list)
    logits: LogitsVerdict | None = None
    added: Added | None = None
    floor: Floor | None = None

    @property
    def first(self) -> Row | None:
        """The first tensor that is not ok."""
        return next((row for row in self.rows if row.status != OK), None)

    @property
    def accused(self) -> Row | None:
        """The first tensor that is guilty or suspect: the one that mistakes were tried on."""
        return next((row for row in self.rows if row.status in (GUILTY, SUSPECT)), None)

    def row(self, name: str) -> Row | None:
        """Of a tensor, if it was compared."""
        return next((row for row in self.rows if row.name == name), None)

    @property
    def guilty(self) -> list[Row]:
        return [row for row in self.rows if row.status == GUILTY]

    @property
    def suspects(self) -> list[Row]:
        return [row for row in self.rows if row.status == SUSPECT]

    @property
    def known(self) -> int:
        """Tensors that the reference has: those compared and those missing."""
        return len(self.rows) + len(self.missing)

    def as_dict(self) -> dict:
        """For JSON: what is not finite is None."""
        differences = [row.difference for row in self.rows if row.difference]
        return finite_or_null(
            {
                "ok": self.ok,
                "equal": not differences,
                "compared": len(self.rows),
                "of": self.known,
                "unchecked": self.unchecked,
                "budget": self.budget,
                "factor": self.factor,
                "rerun": self.rerun,
                "first": self.first.name if self.first else None,
                "guilty": [row.name for row in self.guilty],
                "suspects": [row.name for row in self.suspects],
                "not_in_trace": self.between,
                "dump_next": self.next,
                "mistakes": [asdict(match) for match in self.mistakes],
                "search": None if self.search is None else asdict(self.search),
                "nearest_budget": None if self.nearest is None else asdict(self.nearest),
                "hints": self.hints,
                "logits": None if self.logits is None else asdict(self.logits),
                "added": None if self.added is None else asdict(self.added),
                "floor": None if self.floor is None else asdict(self.floor),
                "flips": [asdict(flip) for flip in self.flips],
                "missing": self.missing,
                "unknown": self.unknown,
                "differences": [asdict(d) for d in differences],
                "tensors": [asdict(row) for row in self.rows],
            }
        )
