"""Turns an experiment into a job on a pod, a cluster, or this machine: rendered, shown, and handed over."""
