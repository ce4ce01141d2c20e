"""A model as a service: HTTP and gRPC, by the Open Inference Protocol."""
