"""The backend in this process's memory."""
