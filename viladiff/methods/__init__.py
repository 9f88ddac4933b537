"""The table of methods. A method is one file, one import and one entry here, and its golden file under tests."""

from __future__ import annotations

from viladiff.methods.allspark import AllSpark
from viladiff.methods.base import Method
from viladiff.methods.corrmatch import CorrMatch
from viladiff.methods.cps import Cps
from viladiff.methods.daw import Daw
from viladiff.methods.ddfp import Ddfp
from viladiff.methods.fixmatch import FixMatch
from viladiff.methods.fixmatch_tags import FixMatchTags
from viladiff.methods.logicdiag import LogicDiag
from viladiff.methods.pseudoseg import PseudoSeg
from viladiff.methods.psmt import PsMt
from viladiff.methods.semibaseline import SemiBaseline
from viladiff.methods.semivl import SemiVl
from viladiff.methods.supervised import Supervised
from viladiff.methods.swith import Swith
from viladiff.methods.textprobe import TextProbe
from viladiff.methods.u2pl import U2pl
from viladiff.methods.unimatch import UniMatch
from viladiff.methods.unimatch_v2 import UniMatchV2
from viladiff.methods.viladiff import ViLaDiff

METHODS: dict[str, type[Method]] = {
    "supervised": Supervised,
    "semibaseline": SemiBaseline,
    "viladiff": ViLaDiff,
    "fixmatch": FixMatch,
    "fixmatch_tags": FixMatchTags,
    "unimatch": UniMatch,
    "unimatch_v2": UniMatchV2,
    "daw": Daw,
    "cps": Cps,
    "psmt": PsMt,
    "corrmatch": CorrMatch,
    "swith": Swith,
    "u2pl": U2pl,
    "ddfp": Ddfp,
    "pseudoseg": PseudoSeg,
    "logicdiag": LogicDiag,
    "allspark": AllSpark,
    "semivl": SemiVl,
    "textprobe": TextProbe,
}
