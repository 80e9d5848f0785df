"""The platform on Kubernetes: kustomize bases, components and overlays, and what checks them without a cluster."""
