"""How fast Cupel is, beside the straightforward way of doing the same; `NOTES.md` says how it is measured."""
