"""Centre and scale of a sample that outliers do not move."""

from ..arrays import Float, Tensor


def median_and_deviation(
    values: Float[Tensor, " value *rest"], least: float = 0.0
) -> tuple[Float[Tensor, " *rest"], Float[Tensor, " *rest"]]:
    """Return the median over the first dimension, and the median absolute deviation from it.

    Both in the units of the values. Of an even number of values the lower of the middle two counts,
    as everywhere in torch.

    Args:
        values: Any sample, at least one value.
        least: What the deviation is raised to where it is less (>= 0): values that are nearly all
            alike would make a scale that divides by nothing.
    """
    median = values.median(0).values
    return median, (values - median).abs().median(0).values.clamp_min(least)
