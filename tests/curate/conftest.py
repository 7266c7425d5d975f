from tests.curate.planted_model import planted_model  # noqa: F401  (a fixture)
