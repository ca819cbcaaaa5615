"""Language models as blocks."""
