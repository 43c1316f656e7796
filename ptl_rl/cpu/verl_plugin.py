"""Entry point of group `verl.plugins`: verl imports this module at the end of `import verl`.

That happens in every process which uses verl: the driver, Ray actors, vLLM workers. verl only
imports it, so importing must do the work; and verl swallows failures, so they are recorded for
`ptl_rl.cpu.checks.assert_cpu_platform_active` to report.
"""

from ptl_rl.cpu import checks


def activate() -> None:
    """Make verl run on the CPU in this process. Safe to call twice."""
    # The module registers its platform. Its name is not imported from it: whoever imports that module
    # first gets here through its import of verl, when it does not yet define anything.
    import ptl_rl.cpu.verl_platform  # noqa: F401
    from ptl_rl.cpu import patches, vllm_alias

    patches.apply()
    vllm_alias.register()


if checks.should_activate():
    try:
        activate()
    except Exception as error:
        checks.record_plugin_error(error)
        raise
