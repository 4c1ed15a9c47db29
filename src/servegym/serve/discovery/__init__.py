"""Where a router's replicas are found while it runs: a watched file, DNS, Kubernetes."""
