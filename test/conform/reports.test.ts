import { describe, expect, it } from 'vitest';
import type { CheckResult, ConformanceReport, Verdict } from '../../src/conform/index.ts';
import { htmlReport } from '../../tools/conform/html.ts';
import { jsonReport } from '../../tools/conform/json.ts';
import { junitReport } from '../../tools/conform/junit.ts';
import { escapeMarkup } from '../../tools/conform/markup.ts';
import { conforms, summarise } from '../../tools/conform/summary.ts';
import { textReport } from '../../tools/conform/text.ts';

function result(id: CheckResult['id'], verdict: Verdict, change: Partial<CheckResult> = {}): CheckResult {
  return {
    id,
    section: '2.12.1.5',
    level: 'MUST',
    title: `title of ${id}`,
    verdict,
    detail: 'a\nb',
    duration: 3,
    ...change,
  };
}

function reportOf(checks: readonly CheckResult[], lost: string | null = null): ConformanceReport {
  const ids = {
    vendorId: 0x1af4,
    deviceId: 0x1041,
    subsystemVendorId: 0,
    subsystemId: 0x40,
    revisionId: 1,
    classCode: 0x020000,
  };
  return {
    device: {
      address: 'vfio-user:/x',
      ...ids,
      interruptVectors: 5,
      wire: 'virtio-1.4',
      ring: 'split',
      link: 'loopback',
    },
    checks,
    lost,
  };
}

const mixed = reportOf([
  result('PCI-001', 'pass'),
  result('ADM-001', 'fail', { level: 'SHOULD', detail: 'expected <EINVAL> & "more"\nsent it' }),
  result('ADM-002', 'not-applicable', { detail: 'no queue' }),
  result('ADM-003', 'untestable', { detail: 'no way' }),
]);

describe('the summary', () => {
  it('counts each verdict', () => {
    expect(summarise(mixed.checks)).toEqual({ pass: 1, fail: 1, notApplicable: 1, untestable: 1 });
  });

  it('calls a device conforming unless a MUST failed', () => {
    expect(conforms(mixed.checks)).toBe(true);
    expect(conforms([result('ADM-001', 'fail')])).toBe(false);
    expect(conforms([])).toBe(true);
  });
});

describe('the JSON report', () => {
  it('has the fields that are promised and no other', () => {
    const report = JSON.parse(JSON.stringify(jsonReport(mixed)));
    expect(Object.keys(report)).toEqual(['device', 'checks', 'summary']);
    for (const check of report.checks) {
      expect(Object.keys(check)).toEqual(['id', 'section', 'level', 'title', 'verdict', 'detail']);
    }
    expect(report.summary).toEqual({ pass: 1, fail: 1, notApplicable: 1, untestable: 1 });
  });
});

describe('the text report', () => {
  it('shows what failed in full, and counts the rest', () => {
    const text = textReport(mixed, false);
    expect(text).toContain('FAIL ADM-001 (2.12.1.5, SHOULD): title of ADM-001\n     expected <EINVAL>');
    expect(text).not.toContain('title of PCI-001');
    expect(text.trimEnd()).toMatch(/The device conforms; 1 SHOULD failed\.$/);
  });

  it('lists every check when asked to', () => {
    expect(textReport(mixed, true)).toContain('title of PCI-001');
  });

  it('says that the device is gone', () => {
    expect(textReport(reportOf([], 'it died'), false)).toContain('The device is gone: it died');
  });
});

describe('the JUnit report', () => {
  it('has a suite for each area, a failure for what failed, and skips what was not tried', () => {
    const xml = junitReport(mixed);
    expect(xml.startsWith('<?xml version="1.0" encoding="UTF-8"?>\n<testsuites ')).toBe(true);
    expect(xml.match(/<testsuite /g)).toHaveLength(2);
    expect(xml.match(/<testcase /g)).toHaveLength(4);
    expect(xml).toContain('tests="4" failures="1" errors="0" skipped="2"');
    expect(xml).toContain('<failure type="SHOULD" message="expected &lt;EINVAL&gt; &amp; &quot;more&quot;">');
    expect(xml).toContain('<skipped message="untestable: no way"/>');
  });

  it('is well formed: every tag that is opened is closed', () => {
    const open: string[] = [];
    for (const [, closing, name, attributes] of junitReport(mixed).matchAll(/<(\/?)([a-z-]+)([^<>?]*)>/g)) {
      if (closing === '/') expect(open.pop()).toBe(name);
      else if (!attributes.endsWith('/')) open.push(name);
    }
    expect(open).toEqual([]);
  });
});

describe('the HTML report', () => {
  const html = htmlReport(mixed);

  it('loads nothing and runs nothing', () => {
    expect(html).not.toMatch(/<script|<link|<img|src=|@import|url\(|https?:/i);
    expect(html).toContain("default-src 'none'");
  });

  it('has a foldable entry for each check; those that failed come first, are open, and are linked from their area', () => {
    expect(html.match(/<details class="check /g)).toHaveLength(4);
    expect(html.indexOf('id="ADM-001"')).toBeLessThan(html.indexOf('id="PCI-001"'));
    expect(html.match(/<a class="check fail SHOULD" href="#ADM-001">/g)).toHaveLength(1);
    expect(html).toMatch(/<details class="check fail SHOULD" id="ADM-001" open>/);
    expect(html).toMatch(/<details class="check pass MUST" id="PCI-001">/);
  });

  it('has a check box for each verdict, level and area, and a rule for each box', () => {
    const boxes = [...html.matchAll(/type="checkbox" id="([^"]+)"/g)].map(([, id]) => id);
    expect(boxes).toEqual([
      'show-fail',
      'show-pass',
      'show-not-applicable',
      'show-untestable',
      'show-MUST',
      'show-SHOULD',
      'show-PCI',
      'show-ADM',
    ]);
    for (const id of boxes) expect(html).toContain(`body:has(#${id}:not(:checked))`);
  });

  it('shows the bytes of an exchange below it', () => {
    const detail = 'wrong\nsent 2 bytes: X\n  0000  01 02\ncame 1 byte: X\n  0000  ff';
    const one = htmlReport(reportOf([result('ADM-001', 'fail', { detail })]));
    expect(one).toContain('<li>sent 2 bytes: X<pre>0000  01 02</pre></li><li>came 1 byte: X<pre>0000  ff</pre></li>');
  });

  it('has no section of failures when nothing failed', () => {
    expect(htmlReport(reportOf([result('PCI-001', 'pass')]))).not.toContain('What failed');
  });

  it('escapes what the device and the checks say', () => {
    expect(html).toContain('expected &lt;EINVAL&gt; &amp; &quot;more&quot;');
  });
});

describe('escapeMarkup', () => {
  it('escapes what has a meaning, and replaces what XML forbids', () => {
    expect(escapeMarkup(`<a b='c' d="e">&`)).toBe('&lt;a b=&#39;c&#39; d=&quot;e&quot;&gt;&amp;');
    expect(escapeMarkup('a\u0000b\u001bc\ud800d\nz')).toBe('a\ufffdb\ufffdc\ufffdd\nz');
    expect(escapeMarkup('\u{1f600}é')).toBe('\u{1f600}é');
  });
});
