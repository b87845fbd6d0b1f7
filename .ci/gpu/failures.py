"""A plugin of pytest that prints each failure at once, also in a run that is cut off."""


def pytest_runtest_logreport(report):
    """Print what failed, and where."""
    if report.failed:
        print(
            f"\nFAILED {report.nodeid} ({report.when})\n{report.longreprtext[-3000:]}", flush=True
        )
