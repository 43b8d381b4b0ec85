#!/usr/bin/env node
/**
 * The command line `vipsec`. A file of `commands/` holds one subcommand, whose name it has, or a few, and exports `command()`, which
 * returns it or them as commander `Command`s. A command that cannot do its job throws; `cli.ts` says what becomes of it.
 */
import { readdirSync } from 'node:fs';
import { Command } from 'commander';
import { endQuietlyWithoutReader, reportError } from './cli.ts';
import { packageVersion } from './package-root.ts';

const program = new Command('vipsec')
  .description('Userspace virtio-net driver with inline IPsec: bring-up, demonstration, and offline tools.')
  .version(packageVersion(), '-V, --version', 'print the version')
  .helpOption('-h, --help', 'print help')
  .showSuggestionAfterError()
  .exitOverride()
  // The error is printed once, by `reportError`.
  .configureOutput({ outputError: () => {} });

/** Loads the file of the subcommand that is called; all of them when none is, for the help. */
async function addCommands(): Promise<void> {
  const folder = new URL('./commands/', import.meta.url);
  const files = readdirSync(folder).filter((file) => /(?<!\.d)\.[jt]s$/.test(file));
  const called = process.argv[2];
  if (called === '-V' || called === '--version') return;
  const wanted = files.filter((file) => file.replace(/\.[jt]s$/, '') === called);
  for (const file of (wanted.length > 0 ? wanted : files).sort()) {
    const module: { command?: () => Command | readonly Command[] } = await import(new URL(file, folder).href);
    if (module.command === undefined) throw new Error(`commands/${file} exports no command`);
    for (const command of [module.command()].flat()) program.addCommand(inherit(command));
  }
}

/** Gives `command` and all below it the settings of the program. */
function inherit(command: Command): Command {
  command.copyInheritedSettings(program);
  command.commands.forEach(inherit);
  return command;
}

endQuietlyWithoutReader();
try {
  await addCommands();
  await program.parseAsync();
} catch (error) {
  process.exitCode = reportError(error);
}
