"""What knowing the future would bring: offline search through whole episodes, at least so much."""
