"""What concerns the process and the operating system: forks, threads, signals, memory."""
