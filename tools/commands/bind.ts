/**
 * `vipsec bind`: a PCI function goes from its kernel driver to vfio-pci. (`vipsec unbind` is the way back.)
 */
import { Command } from 'commander';
import { type BindResult, bindFunction } from '../../src/vfio/bind.ts';
import { print, printJson } from '../cli.ts';

interface Options {
  readonly json?: true;
}

export function command(): Command {
  return driverCommand('bind', 'hand a function from the kernel to vfio-pci, so that vipsec can open it', bindFunction);
}

/** A command that changes the driver of one function and says what it was and is. */
export function driverCommand(name: string, description: string, change: (address: string) => BindResult): Command {
  return new Command(name)
    .description(description)
    .argument('<address>', 'PCI address, such as 0000:01:00.0 (see `vipsec devices`)')
    .option('--json', 'print the result as one JSON document')
    .action((address: string, options: Options) => report(change(address), options));
}

function report(result: BindResult, options: Options): void {
  if (options.json === true) printJson(result);
  else if (result.from === result.to) print(`${result.address} has ${result.to ?? 'no driver'} already`);
  else print(`${result.address}: ${result.from ?? 'no driver'} -> ${result.to ?? 'no driver'}`);
}
