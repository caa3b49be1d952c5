"""Plan a stage before it is launched: does it fit, how fast is it, which layout; by arithmetic or by the compiler."""
