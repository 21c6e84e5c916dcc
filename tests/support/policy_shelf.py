"""A store of policy for tests of what is pure: it commits plans, and gives the state that a replica would have."""

from collections.abc import Mapping, Sequence
from typing import Any

from control_plane.state.mirror import State
from control_plane.state.policy import Catalogue, Plan, Policy, plan_apply, plan_rollback, policy_of, settle
from control_plane.store.base import Batch, Compare, Conflict, Entry, Event, Operation, Put, check_transaction


class Shelf:
    def __init__(self) -> None:
        self.state = State()
        self.entries: dict[str, Entry] = {}
        self.revision = 0
        self.catalogue = Catalogue()

    @property
    def policy(self) -> Policy:
        return policy_of(self.state)

    def commit(self, operations: Sequence[Operation], compares: Sequence[Compare] = ()) -> int:
        check_transaction(operations, compares)
        assert sum(len(each.value) for each in operations if isinstance(each, Put)) < 1_400_000  # etcd: 1.5 MB
        for each in compares:
            entry = self.entries.get(each.key)
            if (entry.revision if entry is not None else 0) != each.revision:
                raise Conflict({each.key: entry})
        self.revision += 1
        events = []
        for operation in operations:
            entry = Entry(operation.key, operation.value, self.revision) if isinstance(operation, Put) else None
            if entry is None:
                self.entries.pop(operation.key, None)
            else:
                self.entries[operation.key] = entry
            events.append(Event(operation.key, entry))
        self.state.apply(Batch(self.revision, tuple(events)))
        return self.revision

    def put(self, key: str, value: bytes) -> None:
        self.commit([Put(key, value)])

    def plan(self, files: Mapping[str, str], **more: Any) -> Plan:
        more = {"author": "ana", "at": 1.0, "catalogue": self.catalogue} | more
        return plan_apply(self.policy, files, **more)

    def apply(self, files: Mapping[str, str], **more: Any) -> Plan:
        return self.do(self.plan(files, **more))

    def rollback(self, to: int, **more: Any) -> Plan:
        more = {"author": "ana", "at": 1.0, "catalogue": self.catalogue} | more
        return self.do(plan_rollback(self.policy, to, **more))

    def do(self, plan: Plan) -> Plan:
        if plan.operations:
            self.commit(plan.operations, plan.compares)
        self.follow()
        return plan

    def follow(self, implicit: Sequence[str] = ()) -> None:
        policy = self.policy
        self.catalogue.update(policy.defaults, policy.enforced, policy.services, implicit, policy.damaged)

    def settle(self) -> int:
        """All of it; how many transactions that took."""
        count = 0
        while (step := settle(self.policy)) is not None:
            self.commit(step.operations, step.compares)
            count += 1
        return count

    def texts(self) -> dict[str, str]:
        return {name: held.record.text for name, held in sorted(self.policy.documents.items())}
