/** What is decided before the kernel is asked. The rest needs a kernel and an IOMMU: qemu-test/scenarios/vfio-*.ts. */
import { readdirSync } from 'node:fs';
import { afterEach, describe, expect, it } from 'vitest';
import { openKernelVfio } from '../../src/vfio/kernel.ts';
import { FakeSysfs } from './fake-sysfs.ts';

const NIC = '0000:01:00.0';
let tree: FakeSysfs | undefined;
afterEach(() => tree?.remove());

describe('opening a function through the kernel', () => {
  it.each([
    ['an address that is none', 'eth0', [], 'BAD_ADDRESS'],
    ['an absent function', NIC, [], 'NO_SUCH_FUNCTION'],
    ['a function without an IOMMU', NIC, [{ address: NIC, driver: 'vfio-pci' }], 'NO_IOMMU'],
    ['a function that the kernel drives', NIC, [{ address: NIC, driver: 'mlx5_core', group: '1' }], 'NOT_BOUND'],
    [
      'a function whose group the kernel uses',
      NIC,
      [
        { address: NIC, driver: 'vfio-pci', group: '1' },
        { address: '0000:01:00.1', driver: 'snd_hda_intel', group: '1' },
      ],
      'GROUP_NOT_VIABLE',
    ],
  ])('refuses %s', (_, address, functions, code) => {
    tree = new FakeSysfs(functions);
    const { files } = tree;
    expect(() => openKernelVfio(address, { files })).toThrow(expect.objectContaining({ code }));
  });

  it('names the driver that has the function, and the command that takes it away', () => {
    tree = new FakeSysfs([{ address: NIC, driver: 'mlx5_core', group: '1' }]);
    const { files } = tree;
    expect(() => openKernelVfio(NIC, { files })).toThrow(/mlx5_core/);
    expect(() => openKernelVfio(NIC, { files })).toThrow(
      expect.objectContaining({ hint: expect.stringContaining(`vipsec bind ${NIC}`) }),
    );
  });

  it('leaves nothing open when the group file of a bound function is missing', () => {
    tree = new FakeSysfs([{ address: NIC, driver: 'vfio-pci', group: '999999' }]);
    const { files } = tree;
    const attempt = () => openKernelVfio(NIC, { files });
    expect(attempt).toThrow(expect.objectContaining({ code: 'VFIO_UNUSABLE' }));
    const before = readdirSync('/proc/self/fd').length;
    expect(attempt).toThrow();
    expect(readdirSync('/proc/self/fd').length).toBe(before);
  });
});
