"""Which rollout-only nodes a run has, and which leader each of them works for: looked up between two phases, by all ranks together."""

from pathlib import Path

from tandem.engine.rollout.fleet import FleetEngine
from tandem.engine.rollout.nodes import FOLDER, Announcement, assign, read_announcement
from tandem.engine.run import Run


class Roster:
    """One per rank. Rank 0 reads what nodes announce; every rank knows who has which.

    Args:
        fleet: this rank's, on leaders.
        model: the run's, see `model_digest`.
    """

    def __init__(self, run: Run, fleet: FleetEngine | None, model: str) -> None:
        self._run, self._fleet, self._model = run, fleet, model
        self._leader_of: dict[str, int] = {}
        self._told: dict[str, str] = {}  # what was said of an announcement that was refused

    def meet(self) -> None:
        """Tell this rank's fleet its nodes, and where the other leaders' servers of this machine are. A collective."""
        run, fleet = self._run, self._fleet
        seen = self._read(fleet) if run.rank == 0 and fleet is not None else []
        facts = run.gather((seen, fleet.url if fleet is not None else None))
        nodes: list[Announcement] = facts[0][0]
        self._leader_of = assign([node.name for node in nodes], run.leaders, self._leader_of)
        if fleet is not None:
            first = run.rank - run.local_rank
            here = [rank for rank in run.leaders if rank != run.rank and first <= rank < first + run.ranks_per_node]
            peers = [(f"rank {rank}'s SGLang server", facts[rank][1]) for rank in here if facts[rank][1] is not None]
            fleet.meet(peers, [node for node in nodes if self._leader_of[node.name] == run.rank])

    def _read(self, fleet: FleetEngine) -> list[Announcement]:
        nodes = list[Announcement]()
        for path in sorted((self._run.dir / FOLDER).glob("*.json")):
            try:
                nodes.append(read_announcement(path, model=self._model, sglang=fleet.sglang))
            except FileNotFoundError:
                continue  # it has just left
            except (ValueError, OSError) as error:
                self._refuse(path, str(error))
        return nodes

    def _refuse(self, path: Path, reason: str) -> None:
        if self._told.get(path.name) != reason:
            self._told[path.name] = reason
            print(f"rank {self._run.rank}: rollout node {path} is refused: {reason}", flush=True)
