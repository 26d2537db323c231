"""The tools beside `fit`, `validate` and `test`; one file each."""
