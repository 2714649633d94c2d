"""The vocabulary of all processes: messages, errors, specs, and the Engine protocol. Imports only msgspec."""
