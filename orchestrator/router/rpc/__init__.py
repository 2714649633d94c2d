"""The ZeroMQ RPC server: Generate, Cancel, Credit and Query of internal clients."""
