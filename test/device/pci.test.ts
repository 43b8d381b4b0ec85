import { describe, expect, it } from 'vitest';
import { CONFIG_SPACE_SIZE, ConfigField, ConfigSpace, MsixCap, MsixControl } from '../../src/device/pci.ts';
import { pciLayout } from '../../src/device/personalities/standard.ts';
import { VirtioCapField, VirtioCfgType } from '../../src/virtio/pci-layout.ts';

const layout = pciLayout({ queuePairs: 1 });

function make() {
  const log: string[] = [];
  const config = new ConfigSpace(layout, {
    functionLevelReset: () => log.push('flr'),
    msixControl: () => log.push('msix'),
    readBar: (bar, offset, width) => {
      log.push(`read ${bar} ${offset} ${width}`);
      return 0x11223344;
    },
    writeBar: (bar, offset, width, value) => log.push(`write ${bar} ${offset} ${width} ${value}`),
  });
  const read = (at: number, width: number) => {
    const bytes = config.read(at, width);
    return bytes.reduceRight((value, byte) => value * 256 + byte, 0);
  };
  const write = (at: number, width: number, value: number) =>
    config.write(
      at,
      Uint8Array.from({ length: width }, (_, i) => Math.floor(value / 2 ** (8 * i))),
    );
  const capabilities: { at: number; id: number; type: number }[] = [];
  for (let at = read(ConfigField.capabilities, 1); at !== 0; at = read(at + 1, 1)) {
    capabilities.push({ at, id: read(at, 1), type: read(at + VirtioCapField.cfgType, 1) });
  }
  return { config, log, read, write, capabilities };
}

describe('PCI configuration space', () => {
  it('identifies a non-transitional virtio network device', () => {
    const { read } = make();
    expect(read(ConfigField.vendorId, 2)).toBe(0x1af4);
    expect(read(ConfigField.deviceId, 2)).toBe(0x1041);
    expect(read(ConfigField.revisionId, 1)).toBeGreaterThanOrEqual(1);
    expect(read(ConfigField.subsystemId, 2)).toBeGreaterThanOrEqual(0x40);
    expect(read(ConfigField.classCode, 3)).toBe(0x020000);
    expect(read(ConfigField.status, 2) & 0x10).toBe(0x10);
  });

  it('lists each virtio structure, inside its BAR and aligned as 4.1.4 asks', () => {
    const { read, capabilities } = make();
    const vendor = capabilities.filter(({ id }) => id === 9);
    expect(vendor.map(({ type }) => type).sort()).toEqual([1, 2, 3, 4, 5]);
    for (const { at, type } of vendor) {
      if (type === VirtioCfgType.PCI) continue;
      const bar = read(at + VirtioCapField.bar, 1);
      const offset = read(at + VirtioCapField.offset, 4);
      const length = read(at + VirtioCapField.structureLength, 4);
      expect(offset % 4).toBe(0);
      expect(offset + length).toBeLessThanOrEqual(layout.bars[bar].size);
      expect(read(at + VirtioCapField.length, 1)).toBe(type === VirtioCfgType.NOTIFY ? 20 : 16);
    }
    expect(capabilities.map(({ id }) => id)).toContain(0x11);
    expect(capabilities.map(({ id }) => id)).toContain(0x10);
    expect(capabilities.every(({ at }) => at >= 0x40 && at % 4 === 0)).toBe(true);
  });

  it('has no extended capability in its 4096 bytes', () => {
    expect(
      make()
        .config.read(0x100, CONFIG_SPACE_SIZE - 0x100)
        .every((byte) => byte === 0),
    ).toBe(true);
  });

  it.each([
    [0, 0xffffc004, 0xffffffff],
    [2, 0xffffe004, 0xffffffff],
  ])('answers a sizing write to BAR %i', (bar, low, high) => {
    const { read, write } = make();
    const at = ConfigField.bar0 + 4 * bar;
    write(at, 4, 0xffffffff);
    write(at + 4, 4, 0xffffffff);
    expect([read(at, 4), read(at + 4, 4)]).toEqual([low, high]);
    write(at, 4, 0xfe004000);
    write(at + 4, 4, 7);
    expect([read(at, 4), read(at + 4, 4)]).toEqual([0xfe004004, 7]);
  });

  it('reads zeros from BARs that do not exist, whatever is written', () => {
    const { read, write } = make();
    for (const bar of [4, 5]) {
      write(ConfigField.bar0 + 4 * bar, 4, 0xffffffff);
      expect(read(ConfigField.bar0 + 4 * bar, 4)).toBe(0);
    }
  });

  it('keeps what is read-only', () => {
    const { config, write } = make();
    const before = config.read(0, 0x100);
    for (let at = 0; at < 0x100; at++) if (at !== 0x04 && at !== 0x05 && at !== 0xad) write(at, 1, 0xff);
    const after = config.read(0, 0x100);
    for (const fixed of [0, 1, 2, 3, 6, 8, 9, 10, 11, 14, 0x2c, 0x2e, 0x34, 0x3d, 0x40, 0x41, 0x42, 0x43]) {
      expect(after[fixed], `byte ${fixed}`).toBe(before[fixed]);
    }
  });

  it('lets a driver set the command bits that exist', () => {
    const { config, write } = make();
    write(ConfigField.command, 2, 0xffff);
    expect(config.command).toBe(0x0546);
  });

  it('resets the function when bit 15 of Device Control is written, and only then', () => {
    const { config, log, capabilities, read, write } = make();
    const pcie = capabilities.find(({ id }) => id === 0x10)?.at ?? 0;
    expect((read(pcie + 4, 4) >>> 28) & 1).toBe(1);
    write(pcie + 8, 2, 0x2810);
    expect(log).toEqual([]);
    write(pcie + 8, 2, 0xa810);
    expect(log).toEqual(['flr']);
    expect(read(pcie + 8, 2) & 0x8000).toBe(0);
    write(ConfigField.command, 2, 6);
    config.reset();
    expect(config.command).toBe(0);
  });

  it('tells of the MSI-X enable and mask bits, and keeps the table size', () => {
    const { config, log, read, write } = make();
    const control = config.msixAt + MsixCap.control;
    expect(read(control, 2) & 0x7ff).toBe(layout.msix.vectors - 1);
    write(control, 2, MsixControl.enable | 0x7ff);
    expect(log).toEqual(['msix']);
    expect(read(control, 2)).toBe(MsixControl.enable | (layout.msix.vectors - 1));
    write(control, 2, MsixControl.enable);
    expect(log).toEqual(['msix']);
  });

  describe('the PCI_CFG window (4.1.4.9)', () => {
    const window = (bar: number, offset: number, length: number) => {
      const made = make();
      const at = made.capabilities.find(({ type }) => type === VirtioCfgType.PCI)?.at ?? 0;
      made.write(at + VirtioCapField.bar, 1, bar);
      made.write(at + VirtioCapField.offset, 4, offset);
      made.write(at + VirtioCapField.structureLength, 4, length);
      return { ...made, data: at + 16 };
    };

    it('reads and writes a register of the size named', () => {
      const { log, read, write, data } = window(0, 20, 1);
      expect(read(data, 1)).toBe(0x44);
      write(data, 4, 0x0badcafe);
      expect(log).toEqual(['read 0 20 1', 'write 0 20 1 254']);
    });

    it.each([
      ['another BAR', 2, 0, 4],
      ['a BAR that does not exist', 7, 0, 4],
      ['no structure', 0, 0x800, 4],
      ['the end of a structure', 0, 0x3e, 4],
      ['a misaligned offset', 0, 2, 4],
      ['3 bytes', 0, 0, 3],
      ['no bytes', 0, 0, 0],
      ['2^31 bytes', 0, 0, 2 ** 31],
      ['an offset of 2^32 - 4', 0, 0xfffffffc, 4],
    ])('does nothing for %s', (_, bar, offset, length) => {
      const { log, read, write, data } = window(bar, offset, length);
      read(data, 4);
      write(data, 4, 1);
      expect(log).toEqual([]);
    });
  });
});
