import { rmSync } from 'node:fs';
import { join } from 'node:path';
import { afterEach, describe, expect, it } from 'vitest';
import { type BindOptions, bindFunction, unbindFunction } from '../../src/vfio/bind.ts';
import { describeFunction, listFunctions, normalizeAddress } from '../../src/vfio/sysfs.ts';
import { FakeSysfs } from './fake-sysfs.ts';

const NIC = '0000:01:00.0';
const kernelNic = { address: NIC, driver: 'virtio-pci', group: '7', interface: 'eth0' };

const trees: FakeSysfs[] = [];
afterEach(() => {
  for (const tree of trees.splice(0)) tree.remove();
});

function fake(...args: ConstructorParameters<typeof FakeSysfs>): FakeSysfs {
  const tree = new FakeSysfs(...args);
  trees.push(tree);
  return tree;
}

function options(tree: FakeSysfs, more: BindOptions = {}): BindOptions {
  return { files: tree.files, write: tree.write, loadModule: () => {}, sshConnection: '', ...more };
}

const failing = (code: string) => expect.objectContaining({ code });

describe('PCI addresses', () => {
  it.each([
    ['0000:01:00.0', '0000:01:00.0'],
    ['01:00.7', '0000:01:00.7'],
    ['10000:E1:1F.0', '10000:e1:1f.0'],
  ])('%s is %s', (given, full) => {
    expect(normalizeAddress(given)).toBe(full);
  });

  it.each(['', '1:00.0', '0000:01:00', '0000:01:00.8', '0000:01:20.0', '0000:01:00.0 ', '../01:00.0'])(
    '%j is refused',
    (given) => {
      expect(() => normalizeAddress(given)).toThrow(failing('BAD_ADDRESS'));
    },
  );
});

describe('the list of functions', () => {
  it('holds network and virtio network functions only, by address', () => {
    const tree = fake([
      { address: '0000:02:00.0', ids: [0x8086, 0x1572] },
      { address: '0000:00:1f.2', ids: [0x8086, 0x2922], class: 0x010601 },
      { address: '0000:01:00.0', ids: [0x177d, 0xb903], class: 0x120000 },
      { address: '0000:00:03.0', ids: [0x1af4, 0x1000] },
      { address: '0000:01:00.1', ids: [0x177d, 0xb900] },
    ]);
    const found = listFunctions(tree.files).map(({ address, virtio }) => [address, virtio]);
    expect(found).toEqual([
      ['0000:00:03.0', 'transitional'],
      ['0000:01:00.0', 'octeon'],
      ['0000:01:00.1', 'octeon-pf'],
      ['0000:02:00.0', 'none'],
    ]);
  });

  it('leaves out a function that is taken out while it is read', () => {
    const tree = fake([{ address: '0000:01:00.0' }, { address: '0000:02:00.0' }]);
    rmSync(join(tree.device('0000:01:00.0'), 'vendor'));
    expect(listFunctions(tree.files).map(({ address }) => address)).toEqual(['0000:02:00.0']);
  });

  it('says for each function what is missing, in the order to deal with it', () => {
    const tree = fake([
      { address: NIC, driver: 'virtio-pci', group: '7' },
      { address: '0000:01:00.1', driver: 'e1000e', group: '7' },
      { address: '0000:02:00.0', driver: 'vfio-pci', group: '8' },
      { address: '0000:03:00.0' },
    ]);
    expect(describeFunction(NIC, tree.files).missing).toEqual([
      'its IOMMU group is not viable: 0000:01:00.1 (e1000e)',
      'driver virtio-pci, not vfio-pci',
    ]);
    expect(describeFunction('0000:02:00.0', tree.files).missing).toEqual([]);
    expect(describeFunction('0000:03:00.0', tree.files).missing).toEqual(['no IOMMU', 'no driver, not vfio-pci']);
  });

  it('counts bridges, unbound functions and those of vfio-pci as no obstacle in a group', () => {
    const tree = fake([
      { ...kernelNic },
      { address: '0000:00:01.0', class: 0x060400, driver: 'pcieport', group: '7' },
      { address: '0000:01:00.1', group: '7' },
      { address: '0000:01:00.2', driver: 'vfio-pci', group: '7' },
    ]);
    const { others } = describeFunction(NIC, tree.files);
    expect(others.map(({ harmless }) => harmless)).toEqual([true, true, true]);
  });
});

describe('bind', () => {
  it('overrides the driver, unbinds and probes, in that order', () => {
    const tree = fake([kernelNic]);
    expect(bindFunction(NIC, options(tree))).toEqual({ address: NIC, from: 'virtio-pci', to: 'vfio-pci' });
    expect(tree.writes).toEqual(['driver_override vfio-pci', `unbind ${NIC}`, `drivers_probe ${NIC}`]);
  });

  it('does nothing to a function that vfio-pci has already', () => {
    const tree = fake([{ ...kernelNic, driver: 'vfio-pci' }]);
    expect(bindFunction(NIC, options(tree)).from).toBe('vfio-pci');
    expect(tree.writes).toEqual([]);
  });

  it('loads vfio-pci when the kernel does not have it yet, and says so when that fails', () => {
    const tree = fake([kernelNic], ['virtio-pci']);
    const asked: string[] = [];
    const attempt = () => bindFunction(NIC, options(tree, { loadModule: (name) => asked.push(name) }));
    expect(attempt).toThrow(failing('NO_VFIO_DRIVER'));
    expect(asked).toEqual(['vfio-pci']);
    expect(tree.writes).toEqual([]);
  });

  it('gives the function back to its driver when vfio-pci does not take it', () => {
    const tree = fake([kernelNic]);
    tree.vfioTakes = false;
    expect(() => bindFunction(NIC, options(tree))).toThrow(failing('BIND_FAILED'));
    expect(describeFunction(NIC, tree.files).driver).toBe('virtio-pci');
  });

  it('explains that only root may do it', () => {
    const tree = fake([kernelNic]);
    const write = () => {
      throw Object.assign(new Error('denied'), { code: 'EACCES' });
    };
    expect(() => bindFunction(NIC, options(tree, { write }))).toThrow(failing('NOT_PERMITTED'));
  });

  it.each([
    ['an absent function', [], 'NO_SUCH_FUNCTION'],
    ['a disk', [{ ...kernelNic, class: 0x010802 }], 'NOT_A_NETWORK_FUNCTION'],
    ['a function without an IOMMU', [{ address: NIC, driver: 'virtio-pci' }], 'NO_IOMMU'],
    [
      'a physical function that carries virtual ones',
      [{ ...kernelNic, ids: [0x177d, 0xba00] as const }],
      'PHYSICAL_FUNCTION',
    ],
    [
      'a virtual function that would lose its window',
      [{ ...kernelNic, ids: [0x177d, 0xbd03] as const, driver: 'octep_vdpa' }],
      'OCTEON_DRIVER',
    ],
    [
      'a function whose group the kernel uses',
      [kernelNic, { address: '0000:01:00.1', driver: 'ahci', group: '7' }],
      'GROUP_NOT_VIABLE',
    ],
  ])('refuses %s and touches nothing', (_, functions, code) => {
    const tree = fake(functions);
    expect(() => bindFunction(NIC, options(tree))).toThrow(failing(code));
    expect(tree.writes).toEqual([]);
  });

  it('refuses the no-IOMMU mode of the kernel unless it is asked for by name', () => {
    const tree = fake([kernelNic]);
    tree.proc('../sys/kernel/iommu_groups/7/name', 'vfio-noiommu\n');
    expect(() => bindFunction(NIC, options(tree))).toThrow(failing('NO_IOMMU'));
    expect(bindFunction(NIC, options(tree, { unsafeNoIommu: true })).to).toBe('vfio-pci');
  });
});

describe('bind and the routes of this session', () => {
  const route = (name: string, destination: string, mask: string, metric = 0) =>
    `${name}\t${destination}\t00000000\t0001\t0\t0\t${metric}\t${mask}\t0\t0\t0\n`;
  const head = 'Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n';
  const zeros = '0'.repeat(32);

  it('refuses the function that carries the IPv4 default route', () => {
    const tree = fake([kernelNic]);
    tree.proc('net/route', head + route('eth0', '00000000', '00000000'));
    expect(() => bindFunction(NIC, options(tree))).toThrow(/eth0, which carries the default route/);
  });

  it('refuses the function that carries the IPv6 default route, but not for a route that rejects', () => {
    const tree = fake([kernelNic]);
    const line = (flags: string) => `${zeros} 00 ${zeros} 00 ${zeros} 00000400 00000001 00000000 ${flags} eth0\n`;
    tree.proc('net/ipv6_route', line('00200200'));
    expect(bindFunction(NIC, options(tree)).to).toBe('vfio-pci');
    unbindFunction(NIC, options(tree));
    tree.proc('net/ipv6_route', line('00000003'));
    expect(() => bindFunction(NIC, options(tree))).toThrow(failing('CARRIES_ROUTE'));
  });

  it('refuses a function that is part of a bridge with the default route', () => {
    const tree = fake([kernelNic]);
    tree.stack('br0', 'bond0');
    tree.stack('bond0', 'eth0');
    tree.proc('net/route', head + route('br0', '00000000', '00000000'));
    expect(() => bindFunction(NIC, options(tree))).toThrow(failing('CARRIES_ROUTE'));
  });

  it('refuses the function that leads to the SSH client, by longest prefix and lowest metric', () => {
    const tree = fake([kernelNic]);
    const table = [
      route('wlan0', '00000000', '00000000'),
      route('eth1', '0000010A', '0000FFFF', 10), // 10.1.0.0/16
      route('eth0', '0002010A', '00FFFFFF', 20), // 10.1.2.0/24
      route('eth1', '0002010A', '00FFFFFF', 30),
    ];
    tree.proc('net/route', head + table.join(''));
    const from = (client: string) => options(tree, { sshConnection: `${client} 5000 10.1.2.1 22` });
    expect(() => bindFunction(NIC, from('10.1.2.9'))).toThrow(/SSH/);
    expect(() => bindFunction(NIC, from('::ffff:10.1.2.9'))).toThrow(/SSH/);
    expect(bindFunction(NIC, from('10.1.3.9')).to).toBe('vfio-pci');
  });

  it('refuses the function that leads to an SSH client over IPv6', () => {
    const tree = fake([kernelNic]);
    const prefix = `20010db8${'0'.repeat(24)}`;
    tree.proc('net/ipv6_route', `${prefix} 20 ${zeros} 00 ${zeros} 00000100 00000001 00000000 00000001 eth0\n`);
    const from = (client: string) => options(tree, { sshConnection: `${client} 5000 2001:db8::1 22` });
    expect(() => bindFunction(NIC, from('2001:db8::77'))).toThrow(/SSH/);
    expect(bindFunction(NIC, from('2001:db9::77')).to).toBe('vfio-pci');
  });
});

describe('unbind', () => {
  it('clears the override, unbinds and probes, and the kernel driver is back', () => {
    const tree = fake([kernelNic]);
    bindFunction(NIC, options(tree));
    tree.writes.length = 0;
    expect(unbindFunction(NIC, options(tree))).toEqual({ address: NIC, from: 'vfio-pci', to: 'virtio-pci' });
    expect(tree.writes).toEqual(['driver_override ', `unbind ${NIC}`, `drivers_probe ${NIC}`]);
  });

  it('refuses a function that vfio-pci does not have', () => {
    const tree = fake([kernelNic]);
    expect(() => unbindFunction(NIC, options(tree))).toThrow(failing('NOT_BOUND'));
  });

  it('refuses while a process has the group open, and names it', () => {
    const tree = fake([{ ...kernelNic, driver: 'vfio-pci' }]);
    tree.openFile(4711, '/dev/vfio/7');
    expect(() => unbindFunction(NIC, options(tree))).toThrow(/4711/);
    expect(tree.writes).toEqual([]);
  });
});
