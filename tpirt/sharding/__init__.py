"""Who holds what: partition arithmetic and the one statement of how each weight is split."""
