"""The known mistakes.  Each is a small change of one step of the reference.

Most are bugs that shipped in some engine for this model family.  A mistake changes a copy of the model: its
operations (`model.op`) or its parameters (`model.weight`).  The candidate has made the mistake if the changed
step, on the candidate's own inputs, gives the candidate's output.
"""

from __future__ import annotations

from .anywhere import ANYWHERE
from .attention import ATTENTION
from .delta_net import DELTA_NET
from .experts import EXPERTS
from .norms import NORMS
from .states import STATES

MISTAKES = [*NORMS, *ATTENTION, *DELTA_NET, *STATES, *EXPERTS, *ANYWHERE]
