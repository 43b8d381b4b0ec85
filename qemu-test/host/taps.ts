/**
 * Taps of the host, for QEMU functions with several queues: of QEMU's back ends that need no daemon only `tap` has them. They live with QEMU
 * in a network namespace of its own, so nothing of the host's network changes and no root is needed; at the other end is the host's kernel,
 * with an echo server.
 */
import { existsSync } from 'node:fs';
import { join } from 'node:path';
import type { Components } from '../fetch/components.ts';
import { programIn } from '../fetch/sysroot.ts';
import { GUEST_TOOLS } from '../image/contents.ts';
import type { QemuNic, ScenarioDevice } from '../scenario.ts';
import { tapAddresses, tapName } from '../scenario.ts';
import { run, ToolError } from './process.ts';

/** How to get a namespace: as root it may be had without a user namespace where those are forbidden. */
const WAYS = [
  ['unshare', '--user', '--map-root-user', '--net'],
  ['unshare', '--net'],
] as const;

export interface TapSupport {
  /** The command that enters a new network namespace. */
  readonly enter: readonly string[];
  /** The `ip` of this run. */
  readonly ip: string;
}

/** How taps can be had here; throws ToolError, with the reason, when they cannot. */
export async function tapSupport({ tools }: Pick<Components, 'tools'>): Promise<TapSupport> {
  const program = GUEST_TOOLS.ip.find((path) => existsSync(join(tools, path)));
  if (program === undefined) throw new ToolError(`${tools} holds no ip`, `delete ${tools} and run this again`);
  const { command, args } = programIn(tools, program);
  const ip = [command, ...args].map(quoted).join(' ');
  let reason = '';
  for (const [first, ...rest] of WAYS) {
    try {
      await run(first, [...rest, 'sh', '-c', `${ip} tuntap add dev probe mode tap multi_queue`]);
      return { enter: [first, ...rest], ip };
    } catch (error) {
      if (!(error instanceof ToolError)) throw error;
      reason ||= error.message.split('\n').at(-1) ?? '';
    }
  }
  throw new ToolError(
    `no multi-queue tap in a network namespace of its own: ${reason}`,
    'it needs /dev/net/tun, and user namespaces or root (containers: --device /dev/net/tun --cap-add SYS_ADMIN)',
  );
}

export function hasTaps(devices: readonly ScenarioDevice[]): boolean {
  return devices.some((device) => device.link === 'tap');
}

/** The command line that runs `command` in a namespace with the taps of `devices` and an echo server. */
export function withTaps(
  command: readonly string[],
  devices: readonly ScenarioDevice[],
  { enter, ip }: TapSupport,
  dist: string,
): string[] {
  const nics = devices.filter((device): device is QemuNic => device.kind === 'virtio-net' && device.link === 'tap');
  const lines = nics.flatMap((nic) => {
    const tap = tapName(nic.id);
    const { host, guest, mac } = tapAddresses(devices, nic.id);
    return [
      `${ip} tuntap add dev ${tap} mode tap multi_queue`,
      `${ip} link set dev ${tap} address ${mac} up`,
      `${ip} addr add ${host}/24 dev ${tap}`,
      `${ip} neigh add ${guest} lladdr ${nic.mac} dev ${tap}`,
    ];
  });
  // It must not outlive QEMU, which takes the place of this shell.
  const echo = [process.execPath, join(dist, 'qemu-test/host/echo.js')].map(quoted).join(' ');
  const script = [
    'set -e',
    `${ip} link set lo up`,
    ...lines,
    `setpriv --pdeathsig KILL ${echo} </dev/null >/dev/null 2>&1 &`,
    'exec "$@"',
  ];
  return [...enter, 'sh', '-c', script.join('\n'), 'sh', ...command];
}

function quoted(text: string): string {
  return `'${text.replaceAll("'", "'\\''")}'`;
}
