/**
 * `vipsec devices`: the network functions of this host, and what keeps each from being driven from user space.
 */
import { Command } from 'commander';
import { listFunctions, type PciDescription } from '../../src/vfio/sysfs.ts';
import { note, print, printJson } from '../cli.ts';
import { table } from '../table.ts';

export function command(): Command {
  return new Command('devices')
    .description('list the network functions of this host and whether they are ready')
    .option('--json', 'print the list as one JSON document')
    .action(run);
}

function run(options: { readonly json?: true }): void {
  const functions = listFunctions();
  if (options.json === true) {
    printJson({ functions: functions.map((fn) => ({ ...fn, ready: isReady(fn) })) });
    return;
  }
  if (functions.length === 0) {
    note('no network function on this host: try a device process (vipsec device --socket PATH)');
    return;
  }
  const head = ['address', 'ids', 'virtio', 'driver', 'interface', 'IOMMU group', 'for vipsec'];
  print(table(head, functions.map(row)));
}

function row(fn: PciDescription): string[] {
  const ids = [fn.vendor, fn.device].map((id) => id.toString(16).padStart(4, '0')).join(':');
  const others = fn.others.map(({ address }) => address);
  const group = others.length === 0 ? (fn.group ?? 'none') : `${fn.group} with ${others.join(', ')}`;
  return [fn.address, ids, fn.virtio, fn.driver ?? 'none', fn.interfaces.join(', '), group, verdict(fn)];
}

function isReady(fn: PciDescription): boolean {
  return fn.virtio !== 'none' && fn.missing.length === 0;
}

function verdict(fn: PciDescription): string {
  if (fn.virtio === 'none') return 'not virtio';
  return fn.missing.length === 0 ? 'ready' : fn.missing.join('; ');
}
