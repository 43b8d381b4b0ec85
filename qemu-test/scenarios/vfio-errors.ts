/** What can be wrong with a function, a user or a limit: each is a typed error with a way out, on the real kernel. */

import { chmodSync, chownSync, existsSync, readlinkSync, writeFileSync } from 'node:fs';
import { basename } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { bindFunction } from '../../src/vfio/bind.ts';
import { openKernelVfio } from '../../src/vfio/kernel.ts';
import { devicePath, KERNEL_FILES } from '../../src/vfio/sysfs.ts';
import { type Guest, mustFail, same } from '../guest/guest.ts';
import type { OpenRequest } from '../guest/open-function.ts';
import { Helper } from '../guest/process.ts';
import type { Scenario } from '../scenario.ts';

const USER = 1000;
/** KiB that the ordinary user may lock; more than that, and less, in bytes. */
const LOCKED_MEMORY = 1024;
const TOO_MUCH = 2 ** 21;
const ENOUGH = 2 ** 19;
/** Above what 39 bits reach. */
const TOO_HIGH = { start: 2 ** 40, last: 2 ** 40 + 2 ** 30 - 1 } as const;

const Check = {
  absent: 'a function that is not there is refused',
  group: 'a function whose group the kernel shares is refused and the others are named',
  viable: 'the group is usable once all of it is bound',
  notRoot: 'vipsec bind is refused to an ordinary user, in one line with a hint',
  user: 'an ordinary user without the group file is refused',
  limit: 'a limit on locked memory that is too small is named as the cause',
  owner: 'an ordinary user who owns the group file and has the limit opens it',
  ranges: 'the ranges of a 39-bit IOMMU end below 2^39',
  window: 'a window outside of the ranges is refused',
  high: 'memory at the very top of the ranges can be mapped',
  detached: 'views of freed memory read zeros',
  unplug: 'a function that is unplugged while open is gone, not a crash',
  removed: 'after close the kernel finishes the unplugging',
} as const;

export const scenario: Scenario = {
  title: 'errors of binding, opening and mapping, on a 39-bit IOMMU',
  machine: { qemu: 'stock', iommu: 39 },
  devices: [
    { kind: 'virtio-net', id: 'nic', mac: '52:54:00:00:03:01', iommu: true, link: 'host' },
    { kind: 'virtio-net', id: 'left', mac: '52:54:00:00:03:02', iommu: true, link: 'host' },
    {
      kind: 'virtio-net',
      id: 'right',
      mac: '52:54:00:00:03:03',
      iommu: true,
      link: 'host',
      placement: { besides: 'left' },
    },
  ],
  modules: ['virtio_pci', 'virtio_net', 'vfio_pci', 'vfio_iommu_type1'],
  timeout: 300,
  checks: Object.values(Check),

  async guest(guest) {
    const nic = guest.address('nic');
    await guest.check(Check.absent, () => mustFail('NO_SUCH_FUNCTION', () => openKernelVfio('0000:7f:00.0')));
    await checkGroup(guest);
    await guest.check(Check.notRoot, () => {
      const { status, stderr } = guest.node('tools/vipsec.js', ['bind', nic], { user: USER });
      same('exit code', status, 1);
      if (!/^vipsec: error: .*\[NOT_PERMITTED\]\nhint: .*\n$/.test(stderr)) throw new Error(stderr);
      return stderr.trim();
    });
    bindFunction(nic);
    await checkUser(guest, nic);
    await checkRanges(guest, nic);
    await checkUnplug(guest, nic);
  },

  async host(host) {
    await host.hear('unplug');
    await host.unplug('nic');
  },
};

async function checkGroup(guest: Guest): Promise<void> {
  const left = guest.address('left');
  const right = guest.address('right');
  await guest.check(Check.group, async () => {
    const message = await mustFail('GROUP_NOT_VIABLE', () => bindFunction(left));
    if (!message.includes(right) || !message.includes('virtio-pci')) throw new Error(message);
    return message;
  });
  await guest.check(Check.viable, () => {
    writeFileSync(`/sys/bus/pci/devices/${right}/driver/unbind`, right);
    bindFunction(left);
    openKernelVfio(left).close();
  });
}

async function checkUser(guest: Guest, nic: string): Promise<void> {
  const command = guest.nodeCommand('qemu-test/guest/open-function.js', [nic]);
  const limited = ['sh', '-c', `ulimit -l ${LOCKED_MEMORY}; exec "$0" "$@"`, ...command];
  const user = await Helper.start('the ordinary user', limited, USER);
  const attempt = async (bytes: number) => Object(await user.request({ bytes } satisfies OpenRequest));
  const group = basename(readlinkSync(`/sys/bus/pci/devices/${nic}/iommu_group`));
  chmodSync('/dev/vfio/vfio', 0o666);
  await guest.check(Check.user, async () => {
    const { code, hint } = await attempt(ENOUGH);
    same('code', code, 'NOT_PERMITTED');
    return hint;
  });
  chownSync(`/dev/vfio/${group}`, USER, USER);
  await guest.check(Check.limit, async () => {
    const { code, message, hint } = await attempt(TOO_MUCH);
    same('code', code, 'LOCKED_MEMORY_LIMIT');
    if (!message.includes(`${LOCKED_MEMORY} KiB`)) throw new Error(message);
    return `${message} (${hint})`;
  });
  await guest.check(Check.owner, async () => same('result', await attempt(ENOUGH), { opened: true }));
  await user.end();
}

async function checkRanges(guest: Guest, nic: string): Promise<void> {
  const fn = openKernelVfio(nic);
  const { last } = fn.iovaRanges[fn.iovaRanges.length - 1];
  await guest.check(Check.ranges, () => {
    if (last >= 2 ** 39) throw new Error(`the last range ends at 0x${last.toString(16)}`);
    return `0x${last.toString(16)}`;
  });
  fn.close();
  await guest.check(Check.window, () => mustFail('IOVA_OUTSIDE', () => openKernelVfio(nic, { iovaWindow: TOO_HIGH })));
  await guest.check(Check.high, () => {
    const top = openKernelVfio(nic, { iovaWindow: { start: last + 1 - 2 ** 21, last } });
    const memory = top.allocateDma(4096);
    top.close();
    return `0x${memory.iova.toString(16)}`;
  });
  await guest.check(Check.detached, () => {
    const again = openKernelVfio(nic);
    const memory = again.allocateDma(8192);
    memory.u32[0] = 1;
    again.freeDma(memory);
    same('what is left', memory.u32[0], 0);
    again.close();
  });
}

async function checkUnplug(guest: Guest, nic: string): Promise<void> {
  const fn = openKernelVfio(nic);
  const lost = new Promise<string>((resolve) => fn.onGone?.((reason) => resolve(reason.message)));
  guest.tell('unplug');
  await guest.check(Check.unplug, async () => {
    const reason = await Promise.race([lost, sleep(60_000, 'no word in 60 s', { ref: false })]);
    same('gone', fn.gone, true);
    await mustFail('DEVICE_GONE', () => fn.allocateDma(4096));
    return reason;
  });
  fn.close();
  await guest.check(Check.removed, async () => {
    for (let i = 0; i < 300 && existsSync(devicePath(nic, KERNEL_FILES)); i++) await sleep(100);
    if (existsSync(devicePath(nic, KERNEL_FILES))) throw new Error('it is still there');
  });
}
