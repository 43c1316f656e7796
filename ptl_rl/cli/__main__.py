from ptl_rl.cli import main

main()
