"""How often evaluators have run, in a run that is recorded: by it a resumed run knows what it is still to come to."""


class Evaluations(dict[str, int]):
    """How many evaluations there were, by what records them and the evaluator's name; one object for one engine.

    Attributes:
        known: Whether those from before this process are among them.
    """

    known: bool = False

    def load(self, counts: dict[str, int] | None) -> None:
        """Go on from *counts* of a checkpoint; None if it has none."""
        if counts is not None:
            self.update(counts)
            self.known = True
