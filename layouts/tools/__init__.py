"""Layouts on the host: computed as the DSL would, proved, drawn. No kernel is made from anything in here."""
