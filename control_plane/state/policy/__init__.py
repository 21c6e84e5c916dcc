"""The policy of a mesh: documents, the services they make, and how they change. Pure."""

from .catalogue import Catalogue
from .cut import Fragment, cut
from .diff import Difference, unified_diff
from .history import Policy, Step, policy_of, settle
from .judge import provenance_of
from .plan import Plan, plan_apply, plan_rollback
from .refusals import Clash, NotAllowed, PolicyConflict, PolicyError, PolicyInvalid

__all__ = [
    "Catalogue",
    "Clash",
    "Difference",
    "Fragment",
    "NotAllowed",
    "Plan",
    "Policy",
    "PolicyConflict",
    "PolicyError",
    "PolicyInvalid",
    "Step",
    "cut",
    "plan_apply",
    "plan_rollback",
    "policy_of",
    "provenance_of",
    "settle",
    "unified_diff",
]
