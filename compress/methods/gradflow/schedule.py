"""How the budget falls over the mask updates of the soft stage (our choice)."""


def removed_share(progress: float, schedule: str) -> float:
    """Share of the final removal that is due at ``progress`` in [0, 1] of the soft stage.

    ``s_shaped`` is ``3 p^2 - 2 p^3``: slow while scores are noisiest and slow again at the end.
    ``cubic`` is ``1 - (1 - p)^3``: most goes first.
    """
    p = min(max(progress, 0.0), 1.0)
    if schedule == "s_shaped":
        return p * p * (3 - 2 * p)
    if schedule == "cubic":
        return 1 - (1 - p) ** 3
    raise ValueError(f"budget must be 's_shaped' or 'cubic'; got {schedule!r}; choose one")


def steepest_fall(updates: int, schedule: str) -> float:
    """The largest share of the removal that one of ``updates`` mask updates has to make."""
    steepest = 0 if schedule == "cubic" else (updates - 1) // 2
    after, before = ((k / updates) for k in (steepest + 1, steepest))
    return removed_share(after, schedule) - removed_share(before, schedule)
