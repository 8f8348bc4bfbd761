"""`python -m analysis.literature` writes docs/literature.md."""

from pathlib import Path

from analysis import literature, tables

Path("docs/literature.md").write_text(tables.markdown(literature.tables()), encoding="utf-8")
