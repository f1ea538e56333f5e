"""The process and the operating system: forks, threads, signals, memory."""
