"""Reading a trace of `tpirt --trace`, and its critical path."""
