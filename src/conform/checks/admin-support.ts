/** What checks of administration commands begin with. */
import { AdminOpcode, ResourceType } from '../../virtio/admin-wire.ts';
import { encodeGroup } from '../../virtio-net/flow-filter-wire.ts';
import type { Bench } from '../bench.ts';
import { hex, need } from '../check.ts';
import type { AdminConsole } from '../console.ts';
import { succeeded, useCommands } from '../offer.ts';

/** A reserved opcode. */
export const BAD_OPCODE = 0x7abc;
/** What is legal after a reset. */
export const INITIAL = [AdminOpcode.LIST_QUERY, AdminOpcode.LIST_USE] as const;

/** A running function with an administration queue, and nothing in use. */
export async function adminConsole(bench: Bench): Promise<AdminConsole> {
  return bench.console(await bench.up({ admin: true }));
}

/** With all commands in use. */
export async function usedCommands(bench: Bench): Promise<{ admin: AdminConsole; supported: readonly number[] }> {
  const admin = await adminConsole(bench);
  return { admin, supported: await useCommands(admin) };
}

/** The same; not applicable without capabilities. */
export async function withCapabilities(bench: Bench): Promise<AdminConsole> {
  const { admin, supported } = await usedCommands(bench);
  needCommand(supported, AdminOpcode.CAP_ID_LIST_QUERY);
  return admin;
}

export function needCommand(supported: readonly number[], ...opcodes: readonly number[]): void {
  for (const opcode of opcodes) need(supported.includes(opcode), `the device does not support command ${hex(opcode)}`);
}

/** A flow filter group, for commands that need an object. */
export async function withGroup(bench: Bench): Promise<AdminConsole> {
  const admin = bench.console(await bench.up({ ipsec: true }));
  succeeded(await admin.create(ResourceType.NET_FF_GROUP, 0, encodeGroup({ priority: 7 })));
  return admin;
}
